package sock

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
)

// Hold is a table of nftables(8) that keeps the packets of connections off, in both
// directions: from the moment they are read until they live again, a packet of the
// peer's would meet no socket and be answered by a reset, or one that is about to
// go. It has no owner (NFT_TABLE_F_OWNER): it outlasts us.
type Hold struct {
	Table string
	NetNS string // path of the network namespace
}

// HoldMark is the mark (SO_MARK) of packets that pass.
const HoldMark = 0x0c1c4b17

// HoldPrefix is what the names of all these tables begin with: nobody else's is
// taken away, whatever an image says.
const HoldPrefix = "ocickpt-"

// HoldName is the name of the table of an image.
func HoldName(id [16]byte) string { return fmt.Sprintf("%s%x", HoldPrefix, id) }

// Pair are the addresses of a connection.
type Pair struct{ Local, Peer netip.AddrPort }

// PairOf are the addresses of a connection of the image, those of IPv4 as such.
func PairOf(s *image.Socket) Pair {
	unmap := func(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
	return Pair{unmap(addressOf(s.Address)), unmap(addressOf(s.TCP.Peer))}
}

// Put makes the table.
func (h *Hold) Put(pairs []Pair) error {
	return h.inside(func(c *nftables.Conn) error {
		t := c.AddTable(&nftables.Table{Name: h.Table, Family: nftables.TableFamilyINet})
		var sets [2]*nftables.Set
		for i, address := range []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIP6Addr} {
			key := nftables.MustConcatSetType(address, nftables.TypeInetService, address, nftables.TypeInetService)
			sets[i] = &nftables.Set{Table: t, Name: []string{"v4", "v6"}[i], KeyType: key, Concatenation: true}
			if err := c.AddSet(sets[i], nil); err != nil {
				return err
			}
		}
		if err := c.Flush(); err != nil {
			return err
		}
		if err := h.fill(c, sets, pairs); err != nil {
			return err
		}
		// They take effect with the chains, all at once.
		for _, hook := range []*nftables.ChainHook{nftables.ChainHookInput, nftables.ChainHookOutput} {
			addChain(c, t, hook, sets)
		}
		return c.Flush()
	})
}

// fill adds the connections, as many as go into a message at once.
func (h *Hold) fill(c *nftables.Conn, sets [2]*nftables.Set, pairs []Pair) error {
	const together = 500
	for part := range slices.Chunk(pairs, together) {
		var elements [2][]nftables.SetElement
		for _, p := range part {
			i := 0
			if p.Peer.Addr().Is6() {
				i = 1
			}
			key := slices.Concat(p.Peer.Addr().AsSlice(), port(p.Peer), p.Local.Addr().AsSlice(), port(p.Local))
			elements[i] = append(elements[i], nftables.SetElement{Key: key})
		}
		for i, set := range sets {
			if err := c.SetAddElements(set, elements[i]); err != nil {
				return err
			}
		}
		if err := c.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// port is a port as a part of a key, which is made of registers of four bytes.
func port(a netip.AddrPort) []byte {
	return append(binaryutil.BigEndian.PutUint16(a.Port()), 0, 0)
}

// early is before connection tracking: what it knows of the connections stays as
// it is.
const early = -350

// version is where a version of IP has its addresses.
type version struct {
	protocol       byte
	source, length uint32 // of the source address, which the destination follows
}

var versions = [2]version{{unix.NFPROTO_IPV4, 12, 4}, {unix.NFPROTO_IPV6, 8, 16}}

func versionOf(a netip.Addr) version {
	if a.Is4() {
		return versions[0]
	}
	return versions[1]
}

func (v version) is() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{v.protocol}},
	}
}

func isTCP() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
}

func baseChain(c *nftables.Conn, t *nftables.Table, hook *nftables.ChainHook) *nftables.Chain {
	priority := nftables.ChainPriority(early)
	names := map[*nftables.ChainHook]string{nftables.ChainHookInput: "input", nftables.ChainHookOutput: "output"}
	return c.AddChain(&nftables.Chain{Name: names[hook], Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: &priority})
}

func addChain(c *nftables.Conn, t *nftables.Table, hook *nftables.ChainHook, sets [2]*nftables.Set) {
	chain := baseChain(c, t, hook)
	c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(HoldMark)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}})
	// The peer comes first in a key: it is the source of what comes in.
	peer, local := uint32(0), uint32(1)
	if hook == nftables.ChainHookOutput {
		peer, local = 1, 0
	}
	for i, set := range sets {
		v := versions[i]
		exprs := append(v.is(), isTCP()...)
		register := uint32(unix.NFT_REG32_00)
		for _, side := range []uint32{peer, local} {
			exprs = append(exprs,
				&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: v.source + side*v.length, Len: v.length},
				&expr.Payload{DestRegister: register + v.length/4, Base: expr.PayloadBaseTransportHeader, Offset: 2 * side, Len: 2})
			register += v.length/4 + 1
		}
		exprs = append(exprs, &expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID}, &expr.Verdict{Kind: expr.VerdictDrop})
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
	}
}

// Lift takes the table away, if it is there.
func (h *Hold) Lift() error {
	if !strings.HasPrefix(h.Table, HoldPrefix) {
		return fmt.Errorf("table %q of nftables is none of ocickpt's", h.Table)
	}
	return h.inside(func(c *nftables.Conn) error {
		c.DelTable(&nftables.Table{Name: h.Table, Family: nftables.TableFamilyINet})
		if err := c.Flush(); !errors.Is(err, unix.ENOENT) {
			return err
		}
		return nil
	})
}

// There reports whether the table is there.
func (h *Hold) There() (there bool, err error) {
	err = h.inside(func(c *nftables.Conn) error {
		tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
		there = slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == h.Table })
		return err
	})
	return there, err
}

// PutArrivals makes a table that keeps off whatever comes to sockets that listen:
// connections that the kernel would make now could be accepted by nobody.
func (h *Hold) PutArrivals(listeners []*image.Socket) error {
	return h.inside(func(c *nftables.Conn) error {
		t := c.AddTable(&nftables.Table{Name: h.Table, Family: nftables.TableFamilyINet})
		chain := baseChain(c, t, nftables.ChainHookInput)
		for _, s := range listeners {
			at := addressOf(s.Address)
			exprs := isTCP()
			if to := at.Addr().Unmap(); !to.IsUnspecified() {
				v := versionOf(to)
				exprs = append(exprs, v.is()...)
				exprs = append(exprs,
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: v.source + v.length, Len: v.length},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: to.AsSlice()})
			}
			exprs = append(exprs,
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(at.Port())},
				&expr.Verdict{Kind: expr.VerdictDrop})
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
		}
		return c.Flush()
	})
}

// inside works on the tables of the network namespace.
func (h *Hold) inside(f func(*nftables.Conn) error) error {
	err := nsutil.Inside(h.NetNS, func() error {
		const room = 4 << 20 // bytes; the default does not take many connections
		c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
			return errors.Join(c.SetWriteBuffer(room), c.SetReadBuffer(room))
		}))
		if err != nil {
			return err
		}
		return f(c)
	})
	if err != nil {
		return fmt.Errorf("nftables table %s: %w", h.Table, err)
	}
	return nil
}
