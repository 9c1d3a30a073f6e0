package sock

import (
	"encoding/binary"
	"fmt"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// packet is packet(7): frames of network devices. The rings of PACKET_RX_RING and
// PACKET_TX_RING are memory that program and kernel write at once.
var packet = family{
	types: [][2]int32{{unix.SOCK_RAW, 0}, {unix.SOCK_DGRAM, 0}},
	options: []option{
		{unix.SOL_PACKET, unix.PACKET_AUXDATA, 4},
		{unix.SOL_PACKET, unix.PACKET_ORIGDEV, 4},
		{unix.SOL_PACKET, unix.PACKET_VERSION, 4},
		{unix.SOL_PACKET, unix.PACKET_RESERVE, 4},
		{unix.SOL_PACKET, unix.PACKET_LOSS, 4},
		{unix.SOL_PACKET, unix.PACKET_TIMESTAMP, 4},
		{unix.SOL_PACKET, packetVnetHdr, 4},
		{unix.SOL_PACKET, packetTxHasOff, 4},
		{unix.SOL_PACKET, packetBypass, 4},
		{unix.SOL_PACKET, packetIgnoreOutgoing, 4},
	},
	fresh: true,
	read:  readPacket,
	settle: func(b *tracee.Batch, fd int, s *image.Socket) {
		for _, g := range s.Groups {
			req := binary.NativeEndian.AppendUint32(nil, uint32(g.Device)) // struct packet_mreq, or with a longer address
			req = binary.NativeEndian.AppendUint16(req, uint16(g.Type))
			req = binary.NativeEndian.AppendUint16(req, uint16(len(g.Address)))
			req = append(req, g.Address...)
			req = append(req, make([]byte, max(0, 16-len(req)))...)
			setOption(b, fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, req)
		}
		if s.Fanout != 0 {
			setOption(b, fd, unix.SOL_PACKET, unix.PACKET_FANOUT, binary.NativeEndian.AppendUint32(nil, s.Fanout))
		}
	},
}

// Of include/uapi/linux/if_packet.h and packet_diag.h.
const (
	packetVnetHdr        = 15
	packetTxHasOff       = 19
	packetBypass         = 20
	packetIgnoreOutgoing = 23
	fanoutCBPF           = 6
	fanoutEBPF           = 7
	fanoutUnique         = 0x2000

	packetShowMembers = 1 << 1
	packetShowRings   = 1 << 2
	packetMembers     = 1
	packetRxRing      = 2
	packetTxRing      = 3
	packetMember      = 44 // sizeof(struct packet_diag_mclist)
	packetMessage     = 16 // sizeof(struct packet_diag_msg)
)

func readPacket(in *Inside, fd int, inode uint64, s *image.Socket) error {
	// Family, protocol and device are what bind(2) takes, of a whole struct sockaddr_ll.
	s.Address = append(slices.Clone(s.Address[:min(8, len(s.Address))]), make([]byte, unix.SizeofSockaddrLinklayer-8)...)
	fanout, err := get(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, make([]byte, 4))
	if err != nil {
		return err
	}
	if len(fanout) == 4 {
		s.Fanout = binary.NativeEndian.Uint32(fanout)
	}
	if kind := s.Fanout >> 16 & 0xff; kind == fanoutCBPF || kind == fanoutEBPF {
		return fail.Refuse("", "its fan-out group (PACKET_FANOUT) is led by a program, which the kernel does not give back", "close it before the checkpoint")
	}
	s.Fanout &^= fanoutUnique << 16
	attributes, err := in.askPacket(inode)
	if err != nil {
		return err
	}
	for _, a := range attributes {
		switch a.Attr.Type {
		case packetRxRing, packetTxRing:
			return fail.Refuse("", "it has a ring (PACKET_RX_RING, PACKET_TX_RING), which is not supported", "close it before the checkpoint")
		case packetMembers:
			for m := range slices.Chunk(a.Value, packetMember) {
				if len(m) < packetMember {
					break
				}
				length := int(binary.NativeEndian.Uint16(m[10:]))
				one := image.SocketGroup{
					Device: int32(binary.NativeEndian.Uint32(m)), Type: uint32(binary.NativeEndian.Uint16(m[8:])), Address: slices.Clone(m[12:][:min(length, 32)]),
				}
				for range binary.NativeEndian.Uint32(m[4:]) { // joined so often
					s.Groups = append(s.Groups, one)
				}
			}
		}
	}
	return nil
}

// askPacket asks sock_diag(7) about one packet socket, among all.
func (in *Inside) askPacket(inode uint64) (attributes []syscall.NetlinkRouteAttr, err error) {
	err = nsutil.Inside(in.NetNS, func() error {
		req := make(rawRequest, 20) // struct packet_diag_req
		req[0] = unix.AF_PACKET
		binary.NativeEndian.PutUint32(req[4:], uint32(inode))
		binary.NativeEndian.PutUint32(req[8:], packetShowMembers|packetShowRings)
		dump := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		dump.AddData(req)
		sockets, err := dump.Execute(unix.NETLINK_SOCK_DIAG, 0)
		if err != nil {
			return fmt.Errorf("sock_diag: %w", err)
		}
		for _, m := range sockets {
			if len(m) >= packetMessage && binary.NativeEndian.Uint32(m[4:]) == uint32(inode) {
				attributes, err = nl.ParseRouteAttr(m[packetMessage:])
				return err
			}
		}
		return nil
	})
	return attributes, err
}
