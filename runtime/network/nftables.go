package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const nfgenmsg = 4 // sizeof(struct nfgenmsg)

// nftKind is one kind of object of nftables (include/uapi/linux/netfilter/nf_tables.h).
type nftKind struct {
	name     string
	get, add uint8
	// drop are attributes that only the kernel gives: handles, use counts.
	drop []uint16
}

// nftKinds in the order in which they can be made: each needs only those before.
var nftKinds = []nftKind{
	{"table", unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE, []uint16{unix.NFTA_TABLE_USE, nftaTableHandle}},
	{"chain", unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, []uint16{unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE, nftaChainID}},
	{"object", unix.NFT_MSG_GETOBJ, unix.NFT_MSG_NEWOBJ, []uint16{nftaObjUse, nftaObjHandle}},
	{"flow table", unix.NFT_MSG_GETFLOWTABLE, unix.NFT_MSG_NEWFLOWTABLE, []uint16{nftaFlowUse, nftaFlowHandle}},
	{"set", unix.NFT_MSG_GETSET, unix.NFT_MSG_NEWSET, []uint16{nftaSetHandle, nftaSetType, nftaSetCount}},
	{"set element", unix.NFT_MSG_GETSETELEM, unix.NFT_MSG_NEWSETELEM, nil},
	{"rule", unix.NFT_MSG_GETRULE, unix.NFT_MSG_NEWRULE, []uint16{unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION}},
}

// Attributes that package unix does not have.
const (
	nftaTableHandle = 4 // NFTA_TABLE_HANDLE
	nftaChainFlags  = 10
	nftaChainID     = 11
	nftaObjUse      = 5
	nftaObjHandle   = 6
	nftaFlowUse     = 4
	nftaFlowHandle  = 5
	nftaSetHandle   = 16
	nftaSetType     = 19
	nftaSetCount    = 20
)

const (
	nftTableOwned  = 1 << 1
	nftChainBound  = 1 << 2 // NFT_CHAIN_BINDING
	maxFilterBytes = 4 << 20
)

// first are the numbers of an object's table's and its own name.
const (
	nftaTable = 1 // in every kind of object
	nftaName  = 1 // of a table
)

// readFilters lists the messages that make the rules of nftables again that the
// calling thread's network namespace has, but for tables whose name begins with
// passing.
func readFilters(passing string) (out []image.Netfilter, err error) {
	size := 0
	for i := range nftKinds {
		k := &nftKinds[i]
		asks := [][]byte{make([]byte, nfgenmsg)}
		if k.add == unix.NFT_MSG_NEWSETELEM {
			asks = elementsOf(out)
		}
		for _, ask := range asks {
			list, err := dump(unix.NETLINK_NETFILTER, nftType(k.get), ask)
			if i == 0 && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPROTONOSUPPORT)) {
				return nil, nil // a kernel without nftables
			}
			if err != nil {
				return nil, fmt.Errorf("nftables, %ss: %w", k.name, err)
			}
			for _, m := range list {
				one, err := k.request(m)
				if err != nil {
					return nil, err
				}
				if f := (image.Netfilter{Type: k.add, Message: one}); one != nil && (passing == "" || !strings.HasPrefix(tableName(f), passing)) {
					out = append(out, f)
					size += len(one)
				}
			}
		}
		if len(out) == 0 {
			return nil, nil
		}
	}
	if size > maxFilterBytes {
		return nil, fail.Refuse("nftables", fmt.Sprintf("the rule set has %d bytes; more than %d are not supported", size, maxFilterBytes), "")
	}
	return boundFirst(out)
}

func nftType(kind uint8) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(kind) }

// request makes of what the kernel tells what makes it again.
func (k *nftKind) request(m []byte) ([]byte, error) {
	if len(m) < nfgenmsg {
		return nil, errTruncated
	}
	list, err := attrs(m[nfgenmsg:])
	if err != nil {
		return nil, err
	}
	switch k.add {
	case unix.NFT_MSG_NEWGEN:
		return nil, nil
	case unix.NFT_MSG_NEWTABLE:
		if f := find(list, unix.NFTA_TABLE_FLAGS); f != nil && len(f.data) == 4 && binary.BigEndian.Uint32(f.data)&nftTableOwned != 0 {
			name := ""
			if a := find(list, nftaName); a != nil {
				name = unix.ByteSliceToString(a.data)
			}
			return nil, fail.Refuse("nftables table "+name, "it belongs to a socket and goes with it (flags owner), which is not supported", "make it without that flag")
		}
	}
	head := []byte{m[0], 0, 0, 0} // the family, a version, no resource
	return put(head, without(list, k.drop)...), nil
}

// elementsOf are the requests that list the elements of all sets.
func elementsOf(filters []image.Netfilter) (asks [][]byte) {
	for _, f := range filters {
		if f.Type != unix.NFT_MSG_NEWSET {
			continue
		}
		list, _ := attrs(f.Message[nfgenmsg:])
		ask := []byte{f.Message[0], 0, 0, 0}
		if t, s := find(list, unix.NFTA_SET_TABLE), find(list, unix.NFTA_SET_NAME); t != nil && s != nil {
			asks = append(asks, put(ask, attr{unix.NFTA_SET_ELEM_LIST_TABLE, t.data}, attr{unix.NFTA_SET_ELEM_LIST_SET, s.data}))
		}
	}
	return asks
}

// boundFirst refuses chains without a name of their own (jump { ... }), which no
// message can make again as they were.
func boundFirst(filters []image.Netfilter) ([]image.Netfilter, error) {
	for _, f := range filters {
		if f.Type != unix.NFT_MSG_NEWCHAIN {
			continue
		}
		list, _ := attrs(f.Message[nfgenmsg:])
		if a := find(list, nftaChainFlags); a != nil && len(a.data) == 4 && binary.BigEndian.Uint32(a.data)&nftChainBound != 0 {
			return nil, fail.Refuse("nftables", "a rule has a chain without a name (jump { ... }), which is not supported", "name the chain")
		}
	}
	return filters, nil
}

// tableName is which table a message is about.
func tableName(f image.Netfilter) string {
	list, _ := attrs(f.Message[nfgenmsg:])
	if a := find(list, nftaTable); a != nil {
		return unix.ByteSliceToString(a.data)
	}
	return ""
}

// tableKey is that with its family.
func tableKey(f image.Netfilter) string { return string(f.Message[:1]) + tableName(f) }

// restoreFilters makes the rule set, all of it at once (nfnetlink's batches).
// Tables that are there, those of the engine or of its hooks, are left alone.
func (n *made) restoreFilters() error {
	if len(n.rec.Filters) == 0 {
		return nil
	}
	there := map[string]bool{}
	if err := nsutil.Inside(n.path, func() error {
		list, err := readFilters("")
		for _, f := range list {
			there[tableKey(f)] = true
		}
		return err
	}); err != nil {
		return err
	}
	var missing []image.Netfilter
	for _, f := range n.rec.Filters {
		ok := slices.ContainsFunc(nftKinds, func(k nftKind) bool { return k.add == f.Type })
		if !ok || len(f.Message) < nfgenmsg {
			return fail.Refuse("nftables", fmt.Sprintf("a message of type %d is not known to this version", f.Type), "restore with a newer ocickpt")
		}
		if !there[tableKey(f)] {
			missing = append(missing, f)
		} else if f.Type == unix.NFT_MSG_NEWTABLE {
			n.maker.Warn("a table of nftables was there before and stays as it is", "table", tableName(f))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	w, err := openWire(n.stub, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	if err := n.allowed(w.batch(missing)); err != nil {
		return fail.On("nftables", err)
	}
	return w.close()
}

// batch carries out messages of nftables in one transaction. Each has the
// number of its place as sequence number, by which errors name it.
func (w *wire) batch(list []image.Netfilter) error {
	const (
		begin, end = 0x10, 0x11 // NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
		noFamily   = 0
	)
	about := []byte{noFamily, 0, 0, unix.NFNL_SUBSYS_NFTABLES} // the resource in network byte order
	all := request{kind: begin, body: about}.bytes(0, 0)
	for i, f := range list {
		body := f.Message
		if f.Type == unix.NFT_MSG_NEWSET { // told and not asked for by all, but needed
			attributes, err := attrs(body[nfgenmsg:])
			if err != nil {
				return err
			}
			id := attr{unix.NFTA_SET_ID, binary.BigEndian.AppendUint32(nil, uint32(i+1))}
			body = put(slices.Clone(body[:nfgenmsg]), append(without(attributes, []uint16{unix.NFTA_SET_ID}), id)...)
		}
		flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_APPEND)
		if f.Type != unix.NFT_MSG_NEWRULE {
			flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
		}
		if f.Type == unix.NFT_MSG_NEWSETELEM {
			flags = unix.NLM_F_CREATE
		}
		more := uint16(0)
		if i == len(list)-1 {
			more = unix.NLM_F_ACK
		}
		all = append(all, request{nftType(f.Type), flags, body}.bytes(uint32(i+1), more)...)
	}
	all = append(all, request{kind: end, body: about}.bytes(uint32(len(list)+1), 0)...)
	var b tracee.Batch
	size := ne.AppendUint32(nil, uint32(2*len(all)+1<<16))
	b.Try(unix.SYS_SETSOCKOPT, tracee.W(w.fd), tracee.W(unix.SOL_SOCKET), tracee.W(unix.SO_SNDBUFFORCE), b.Put(size), tracee.W(len(size)))
	send := b.Try(unix.SYS_SENDTO, tracee.W(w.fd), b.Put(all), tracee.W(len(all)), tracee.W(0), tracee.W(0), tracee.W(0))
	reply := b.Reserve(replyRoom)
	receive := b.Try(unix.SYS_RECVFROM, tracee.W(w.fd), reply, tracee.W(replyRoom), tracee.W(unix.MSG_DONTWAIT), tracee.W(0), tracee.W(0))
	if _, err := w.stub.Run(&b); err != nil {
		return err
	}
	if err := errors.Join(b.Err(send), b.Err(receive)); err != nil {
		return err
	}
	got := b.At(reply, int(b.Calls[receive].Ret))
	err := answer(got)
	if at := int(ne.Uint32(got[8:])) - 1; err != nil && at >= 0 && at < len(list) {
		i := slices.IndexFunc(nftKinds, func(k nftKind) bool { return k.add == list[at].Type })
		return fail.On(fmt.Sprintf("nftables table %s, a %s", tableName(list[at]), nftKinds[i].name), err)
	}
	return err
}
