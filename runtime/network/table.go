package network

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// table is one sort of entry that a network namespace has many of: addresses,
// routes, rules, neighbours. The kernel tells an entry with the message that
// makes it, and some more: so one function, clean, serves both directions.
type table struct {
	name          string
	get, add, del uint16
	flags         uint16   // of add, besides NLM_F_CREATE
	header        int      // bytes before the attributes
	asks          [][]byte // heads of the requests that list them
	// clean makes a request of a message; no head: it is the kernel's own affair.
	clean func(head []byte, list []attr) ([]byte, []attr)
	// indexes calls f for each interface number in a message.
	indexes func(head []byte, list []attr, f func(slot []byte))
}

const rtnhLen = 8 // sizeof(struct rtnexthop)

// routeFlags is what can be chosen of a next hop's flags.
const routeFlags = unix.RTNH_F_ONLINK

var nexthops = table{
	name: "next hop", get: unix.RTM_GETNEXTHOP, add: unix.RTM_NEWNEXTHOP, del: unix.RTM_DELNEXTHOP, flags: unix.NLM_F_EXCL,
	header: 8, asks: [][]byte{make([]byte, 8)},
	clean: func(head []byte, list []attr) ([]byte, []attr) {
		head[1] = 0 // nh_scope
		ne.PutUint32(head[4:], ne.Uint32(head[4:])&routeFlags)
		return head, pick(list, unix.NHA_ID, unix.NHA_GROUP, unix.NHA_GROUP_TYPE, unix.NHA_BLACKHOLE, unix.NHA_OIF, unix.NHA_GATEWAY,
			unix.NHA_ENCAP_TYPE, unix.NHA_ENCAP, nhaFDB)
	},
	indexes: func(_ []byte, list []attr, f func([]byte)) { slots(list, f, unix.NHA_OIF) },
}

// addressFlags are what of an address's flags is set and not found out.
const addressFlags = unix.IFA_F_NODAD | unix.IFA_F_HOMEADDRESS | unix.IFA_F_MANAGETEMPADDR | unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_MCAUTOJOIN | unix.IFA_F_OPTIMISTIC

var addresses = table{
	name: "address", get: unix.RTM_GETADDR, add: unix.RTM_NEWADDR, del: unix.RTM_DELADDR, flags: unix.NLM_F_EXCL,
	header: unix.SizeofIfAddrmsg, asks: [][]byte{make([]byte, unix.SizeofIfAddrmsg)},
	clean: func(head []byte, list []attr) ([]byte, []attr) {
		flags := uint32(head[2])
		if a := find(list, unix.IFA_FLAGS); a != nil {
			flags = a.u32()
		}
		if flags&unix.IFA_F_TEMPORARY != 0 && head[0] == unix.AF_INET6 {
			return nil, nil // of privacy extensions, which the kernel makes
		}
		head[2] = 0
		out := pick(list, unix.IFA_ADDRESS, unix.IFA_LOCAL, unix.IFA_LABEL, unix.IFA_BROADCAST, unix.IFA_ANYCAST, unix.IFA_RT_PRIORITY, ifaProto)
		if a := find(list, unix.IFA_CACHEINFO); a != nil && len(a.data) >= 8 {
			out = append(out, attr{unix.IFA_CACHEINFO, append(bytes.Clone(a.data[:8]), make([]byte, 8)...)}) // both lifetimes, no times
		}
		return head, append(out, number(unix.IFA_FLAGS, flags&addressFlags))
	},
	indexes: func(head []byte, _ []attr, f func([]byte)) { f(head[4:8]) },
}

const (
	ifaProto       = 11 // IFA_PROTO, Linux 5.18
	userHZ         = 100
	routeCacheInfo = 32 // sizeof(struct rta_cacheinfo)
)

var routes = table{
	name: "route", get: unix.RTM_GETROUTE, add: unix.RTM_NEWROUTE, del: unix.RTM_DELROUTE, flags: unix.NLM_F_APPEND,
	header: unix.SizeofRtMsg, asks: [][]byte{{0: unix.AF_INET, unix.SizeofRtMsg - 1: 0}, {0: unix.AF_INET6, unix.SizeofRtMsg - 1: 0}},
	clean: func(head []byte, list []attr) ([]byte, []attr) {
		flags := ne.Uint32(head[8:])
		// What comes with an address stands in the table of local ones; which of
		// the devices comes first for multicast is a matter of when they came up.
		own := head[4] == unix.RT_TABLE_LOCAL && head[5] == unix.RTPROT_KERNEL && head[7] != unix.RTN_MULTICAST
		if flags&unix.RTM_F_CLONED != 0 || own {
			return nil, nil
		}
		ne.PutUint32(head[8:], flags&routeFlags)
		keep := []uint16{unix.RTA_DST, unix.RTA_SRC, unix.RTA_IIF, unix.RTA_PRIORITY, unix.RTA_PREFSRC, unix.RTA_METRICS, unix.RTA_FLOW,
			unix.RTA_TABLE, unix.RTA_MARK, unix.RTA_PREF, unix.RTA_EXPIRES, rtaNHID, rtaTTLPropagate}
		if find(list, rtaNHID) == nil { // else they are those of the next hop
			keep = append(keep, unix.RTA_OIF, unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_MULTIPATH, unix.RTA_ENCAP_TYPE, unix.RTA_ENCAP)
		}
		out := pick(list, keep...)
		for _, a := range out {
			if a.number() == unix.RTA_MULTIPATH {
				paths(a.data, func(hop []byte) { hop[2] &= routeFlags })
			}
		}
		if a := find(list, unix.RTA_CACHEINFO); a != nil && len(a.data) >= routeCacheInfo {
			if left := int32(ne.Uint32(a.data[8:])); left > 0 { // rta_expires
				out = append(out, number(unix.RTA_EXPIRES, uint32(left)/userHZ+1))
			}
		}
		return head, out
	},
	indexes: func(_ []byte, list []attr, f func([]byte)) {
		slots(list, f, unix.RTA_OIF, unix.RTA_IIF)
		for _, a := range list {
			if a.number() == unix.RTA_MULTIPATH {
				paths(a.data, func(hop []byte) { f(hop[4:8]) })
			}
		}
	},
}

const (
	rtaTTLPropagate = 26 // RTA_TTL_PROPAGATE
	rtaNHID         = 30 // RTA_NH_ID
	nhaFDB          = 11 // NHA_FDB
	ndaProtocol     = 12 // NDA_PROTOCOL
	ndaFlagsExt     = 15 // NDA_FLAGS_EXT
)

// paths calls f for the struct rtnexthop of each path of a route.
func paths(b []byte, f func(hop []byte)) {
	for len(b) >= rtnhLen {
		n := int(ne.Uint16(b))
		if n < rtnhLen || n > len(b) {
			return
		}
		f(b[:rtnhLen])
		b = b[min((n+3)&^3, len(b)):]
	}
}

var rules = table{
	name: "routing rule", get: unix.RTM_GETRULE, add: unix.RTM_NEWRULE, del: unix.RTM_DELRULE, flags: unix.NLM_F_EXCL,
	header: 12, asks: [][]byte{{0: unix.AF_INET, 11: 0}, {0: unix.AF_INET6, 11: 0}},
	clean: func(head []byte, list []attr) ([]byte, []attr) {
		ne.PutUint32(head[8:], ne.Uint32(head[8:])&unix.FIB_RULE_INVERT) // the others say whether a device is there
		return head, list
	},
	indexes: func([]byte, []attr, func([]byte)) {},
}

var neighbours = table{
	name: "neighbour", get: unix.RTM_GETNEIGH, add: unix.RTM_NEWNEIGH, del: unix.RTM_DELNEIGH, flags: unix.NLM_F_EXCL,
	header: unix.SizeofNdMsg, asks: [][]byte{make([]byte, unix.SizeofNdMsg), {10: unix.NTF_PROXY, unix.SizeofNdMsg - 1: 0}},
	clean: func(head []byte, list []attr) ([]byte, []attr) {
		family, state, flags := head[0], ne.Uint16(head[8:]), head[10]
		if family != unix.AF_INET && family != unix.AF_INET6 || state&unix.NUD_PERMANENT == 0 && flags&unix.NTF_PROXY == 0 {
			return nil, nil // found out, and will be again
		}
		head[11] = 0 // ndm_type
		return head, pick(list, unix.NDA_DST, unix.NDA_LLADDR, ndaProtocol, ndaFlagsExt)
	},
	indexes: func(head []byte, _ []attr, f func([]byte)) { f(head[4:8]) },
}

// slots calls f for interface numbers in attributes.
func slots(list []attr, f func([]byte), kinds ...uint16) {
	for _, a := range pick(list, kinds...) {
		if len(a.data) >= 4 {
			f(a.data)
		}
	}
}

// entry makes the request of a message of the kernel's or an image's: nil where
// there is nothing to request. With translate interface numbers are changed; it
// says no to those of devices that are not ours.
func (t *table) entry(m []byte, translate func(int32) (int32, bool)) ([]byte, error) {
	if len(m) < t.header {
		return nil, errTruncated
	}
	m = bytes.Clone(m)
	list, err := attrs(m[t.header:])
	if err != nil {
		return nil, err
	}
	head, list := t.clean(m[:t.header], list)
	if head == nil {
		return nil, nil
	}
	known := true
	t.indexes(head, list, func(slot []byte) {
		if index := int32(ne.Uint32(slot)); index != 0 {
			to, ok := translate(index)
			ne.PutUint32(slot, uint32(to))
			known = known && ok
		}
	})
	if !known {
		return nil, nil
	}
	return put(head, list...), nil
}

// read lists the entries of the calling thread's namespace.
func (t *table) read(translate func(int32) (int32, bool)) (out [][]byte, err error) {
	for _, ask := range t.asks {
		list, err := dump(unix.NETLINK_ROUTE, t.get, ask)
		if err != nil {
			return nil, fmt.Errorf("%ss: %w", t.name, err)
		}
		for _, m := range list {
			e, err := t.entry(m, translate)
			if err != nil {
				return nil, fmt.Errorf("%ss: %w", t.name, err)
			}
			if e != nil {
				out = append(out, e)
			}
		}
	}
	return out, nil
}

// same is what two entries have in common that are one: time goes on in them.
func (t *table) same(m []byte) string {
	m = bytes.Clone(m)
	list, _ := attrs(m[t.header:])
	kept := list[:0]
	for _, a := range list {
		switch {
		case t == &routes && a.number() == unix.RTA_EXPIRES:
			continue
		case t == &addresses && a.number() == unix.IFA_CACHEINFO:
			for at := 0; at < 8; at += 4 {
				if ne.Uint32(a.data[at:]) != forever {
					clear(a.data[at : at+4])
				}
			}
		}
		kept = append(kept, a)
	}
	return string(put(m[:t.header:t.header], kept...))
}

const forever = 0xffffffff // INFINITY_LIFE_TIME

// passes bounds the attempts to make entries, which may need one another.
const passes = 6

// restore makes the entries of a namespace those of the image. have lists what
// is there. What the kernel makes of its own accord, for an address say, goes
// again where the image does not have it.
func (t *table) restore(w *wire, want [][]byte, have func() ([][]byte, error)) error {
	var failed error
	for range passes {
		there, err := have()
		if err != nil {
			return err
		}
		ops, objects := t.difference(want, there)
		if len(ops) == 0 {
			ops, objects = t.disorder(want, there)
		}
		if len(ops) == 0 {
			return nil
		}
		errs, err := w.send(ops)
		if err != nil {
			return err
		}
		done := 0
		failed = nil
		for i, err := range errs {
			if err == nil {
				done++
			} else if failed == nil {
				failed = fail.On(objects[i], err)
			}
		}
		if done == 0 {
			break
		}
	}
	return failed
}

// difference lists what is to be deleted and what is to be added, in order.
func (t *table) difference(want, there [][]byte) (ops []request, objects []string) {
	missing := map[string]int{}
	for _, m := range want {
		missing[t.same(m)]++
	}
	for _, m := range there {
		if key := t.same(m); missing[key] > 0 {
			missing[key]--
			continue
		}
		ops, objects = append(ops, request{kind: t.del, body: m}), append(objects, t.name+" that the image does not have")
	}
	for _, m := range want {
		key := t.same(m)
		if missing[key] == 0 {
			continue
		}
		missing[key]--
		ops, objects = append(ops, request{t.add, unix.NLM_F_CREATE | t.flags, m}), append(objects, describe(t, m))
	}
	return ops, objects
}

// disorder lists how routes to one destination are put into the order of the
// image, where that is another: the first of them is taken.
func (t *table) disorder(want, there [][]byte) (ops []request, objects []string) {
	if t != &routes {
		return nil, nil
	}
	group := func(all [][]byte) map[string][]string {
		out := map[string][]string{}
		for _, m := range all {
			key := destination(m)
			out[key] = append(out[key], t.same(m))
		}
		return out
	}
	wanted, found := group(want), group(there)
	wrong := func(m []byte) bool { key := destination(m); return !slices.Equal(wanted[key], found[key]) }
	for _, m := range there {
		if wrong(m) {
			ops, objects = append(ops, request{kind: t.del, body: m}), append(objects, describe(t, m))
		}
	}
	for _, m := range want {
		if wrong(m) {
			ops, objects = append(ops, request{t.add, unix.NLM_F_CREATE | t.flags, m}), append(objects, describe(t, m))
		}
	}
	return ops, objects
}

// destination is what routes have in common of which the first is taken.
func destination(m []byte) string {
	list, _ := attrs(m[routes.header:])
	return string(put(slices.Clone(m[:5]), pick(list, unix.RTA_DST, unix.RTA_SRC, unix.RTA_TABLE, unix.RTA_PRIORITY)...))
}

// describe is how messages name an entry.
func describe(t *table, m []byte) string {
	list, _ := attrs(m[t.header:])
	for _, kind := range []uint16{1, 2} { // the address, the destination
		if a := find(list, kind); a != nil {
			if ip, ok := netip.AddrFromSlice(a.data); ok {
				return t.name + " " + ip.String()
			}
		}
	}
	return t.name
}
