package sock

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/nsutil"
)

// Of include/uapi/linux/inet_diag.h: sizes of struct inet_diag_req_v2 and
// struct inet_diag_msg, and attributes.
const (
	inetDiagRequest = 56
	inetDiagMessage = 72
	inetDiagInfo    = 2
	inetDiagMD5     = 18
	anyTCPState     = 0xffffffff
)

// diagnosis is what only sock_diag(7) tells of the TCP sockets of a network
// namespace.
type diagnosis struct {
	// signed are the inodes of sockets with keys of TCP_MD5SIG.
	signed map[uint64]bool
	// peers are the addresses, struct sockaddr, that sockets in SYN_SENT connect
	// to, by inode.
	peers map[uint64][]byte
	// orphans counts by state the connections that no descriptor leads to.
	orphans map[int]int
}

// diagnosis asks about the TCP sockets of an address family, once.
func (in *Inside) diagnosis(family int) (*diagnosis, error) {
	if d := in.diagnoses[family]; d != nil {
		return d, nil
	}
	d := &diagnosis{signed: map[uint64]bool{}, peers: map[uint64][]byte{}, orphans: map[int]int{}}
	err := nsutil.Inside(in.NetNS, func() error {
		// struct inet_diag_req_v2: family, protocol, attributes, padding, states, and
		// a zeroed id, which is any. Keys come along with INET_DIAG_INFO only
		// (inet_sk_diag_fill in net/ipv4/inet_diag.c).
		req := make(rawRequest, inetDiagRequest)
		req[0], req[1], req[2] = byte(family), unix.IPPROTO_TCP, 1<<(inetDiagInfo-1)
		binary.LittleEndian.PutUint32(req[4:], anyTCPState)
		dump := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		dump.AddData(req)
		sockets, err := dump.Execute(unix.NETLINK_SOCK_DIAG, 0)
		if err != nil {
			return fmt.Errorf("sock_diag: %w", err)
		}
		for _, m := range sockets {
			if err := d.add(m); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if in.diagnoses == nil {
		in.diagnoses = map[int]*diagnosis{}
	}
	in.diagnoses[family] = d
	return d, nil
}

// rawRequest is the body of a netlink request.
type rawRequest []byte

func (r rawRequest) Len() int          { return len(r) }
func (r rawRequest) Serialize() []byte { return r }

// add takes in one struct inet_diag_msg.
func (d *diagnosis) add(m []byte) error {
	if len(m) < inetDiagMessage {
		return fmt.Errorf("sock_diag: a message of %d bytes", len(m))
	}
	inode := uint64(binary.LittleEndian.Uint32(m[68:]))
	if inode == 0 {
		d.orphans[int(m[1])]++
		return nil
	}
	if m[1] == tcpSynSent {
		d.peers[inode] = peerOf(m)
	}
	attributes, err := nl.ParseRouteAttr(m[inetDiagMessage:])
	if err != nil {
		return fmt.Errorf("sock_diag: %w", err)
	}
	for _, a := range attributes {
		if a.Attr.Type == inetDiagMD5 {
			d.signed[inode] = true
		}
	}
	return nil
}

// peerOf is the struct sockaddr of a socket's peer.
func peerOf(m []byte) []byte {
	const port, address = 6, 24
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte(m[address:])), binary.BigEndian.Uint16(m[port:]))
	if m[0] == unix.AF_INET6 {
		at = netip.AddrPortFrom(netip.AddrFrom16([16]byte(m[address:])), at.Port())
	}
	return rawAddress(at)
}
