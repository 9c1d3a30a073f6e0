package network

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

var ne = binary.NativeEndian

// attr is a netlink attribute, its type with the flags it came with.
type attr struct {
	kind uint16
	data []byte
}

func (a attr) number() uint16 { return a.kind &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER) }

func (a attr) u32() uint32 {
	if len(a.data) < 4 {
		return 0
	}
	return ne.Uint32(a.data)
}

var errTruncated = errors.New("a netlink message that is cut off")

// attrs takes attributes apart.
func attrs(b []byte) (out []attr, err error) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(ne.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return nil, errTruncated
		}
		out = append(out, attr{ne.Uint16(b[2:]), b[unix.SizeofRtAttr:n]})
		b = b[min((n+3)&^3, len(b)):]
	}
	return out, nil
}

// put writes attributes behind b.
func put(b []byte, list ...attr) []byte {
	for _, a := range list {
		b = ne.AppendUint16(b, uint16(unix.SizeofRtAttr+len(a.data)))
		b = ne.AppendUint16(b, a.kind)
		b = append(b, a.data...)
		b = append(b, make([]byte, -len(a.data)&3)...)
	}
	return b
}

func number(kind uint16, v uint32) attr { return attr{kind, ne.AppendUint32(nil, v)} }

func text(kind uint16, s string) attr { return attr{kind, append([]byte(s), 0)} }

func nested(kind uint16, list ...attr) attr { return attr{kind | unix.NLA_F_NESTED, put(nil, list...)} }

// find is the first attribute of a number, nil without one.
func find(list []attr, kind uint16) *attr {
	for i := range list {
		if list[i].number() == kind {
			return &list[i]
		}
	}
	return nil
}

// pick keeps the attributes that have a number among kinds.
func pick(list []attr, kinds ...uint16) (out []attr) {
	for _, a := range list {
		for _, k := range kinds {
			if a.number() == k {
				out = append(out, a)
			}
		}
	}
	return out
}

// request is one message to the kernel: its type, flags besides NLM_F_REQUEST,
// and what follows struct nlmsghdr.
type request struct {
	kind  uint16
	flags uint16
	body  []byte
}

func (r request) bytes(seq uint32, more uint16) []byte {
	b := make([]byte, 0, unix.NLMSG_HDRLEN+len(r.body)+3)
	b = ne.AppendUint32(b, uint32(unix.NLMSG_HDRLEN+len(r.body)))
	b = ne.AppendUint16(b, r.kind)
	b = ne.AppendUint16(b, r.flags|more|unix.NLM_F_REQUEST)
	b = ne.AppendUint32(b, seq)
	b = ne.AppendUint32(b, 0)
	b = append(b, r.body...)
	return append(b, make([]byte, -len(r.body)&3)...)
}

// dump lists what the kernel has of one sort in the calling thread's network
// namespace, as messages without their struct nlmsghdr.
func dump(protocol int, kind uint16, body []byte) ([][]byte, error) {
	for range 10 {
		req := nl.NewNetlinkRequest(int(kind), unix.NLM_F_DUMP)
		req.AddRawData(body)
		out, err := req.Execute(protocol, 0)
		if !errors.Is(err, nl.ErrDumpInterrupted) {
			return out, err
		}
	}
	return nil, nl.ErrDumpInterrupted
}

// wire is a netlink socket of a stub: what is sent through it is done with no
// more rights than the stub has, both when it made the socket and now
// (netlink_ns_capable in net/netlink/af_netlink.c).
type wire struct {
	stub *tracee.Stub
	fd   int
	seq  uint32
}

// replyRoom is enough for an error with its request's head and a text.
const replyRoom = 1024

func openWire(s *tracee.Stub, protocol int) (*wire, error) {
	var b, set tracee.Batch
	b.Add(unix.SYS_SOCKET, tracee.W(unix.AF_NETLINK), tracee.W(unix.SOCK_RAW|unix.SOCK_CLOEXEC), tracee.W(protocol))
	if _, err := s.Run(&b); err != nil {
		return nil, err
	}
	w := &wire{stub: s, fd: int(b.Calls[0].Ret)}
	on := ne.AppendUint32(nil, 1)
	for _, option := range []int{unix.NETLINK_CAP_ACK, unix.NETLINK_EXT_ACK} { // no echo of the request, but a text
		set.Add(unix.SYS_SETSOCKOPT, tracee.W(w.fd), tracee.W(unix.SOL_NETLINK), tracee.W(option), set.Put(on), tracee.W(len(on)))
	}
	_, err := s.Run(&set)
	return w, err
}

func (w *wire) close() error {
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE, tracee.W(w.fd))
	_, err := w.stub.Run(&b)
	return err
}

// maxWire bounds the bytes of messages that go into one batch.
const maxWire = 1 << 20

// send has messages carried out one by one, and returns the error of each.
func (w *wire) send(list []request) ([]error, error) {
	out := make([]error, 0, len(list))
	for len(list) > 0 {
		var b tracee.Batch
		var replies []tracee.Word
		var reads []int
		n := 0
		for ; n < len(list) && len(b.Data) < maxWire; n++ {
			w.seq++
			m := list[n].bytes(w.seq, unix.NLM_F_ACK)
			b.Try(unix.SYS_SENDTO, tracee.W(w.fd), b.Put(m), tracee.W(len(m)), tracee.W(0), tracee.W(0), tracee.W(0))
			reply := b.Reserve(replyRoom)
			reads = append(reads, b.Try(unix.SYS_RECVFROM, tracee.W(w.fd), reply, tracee.W(replyRoom), tracee.W(unix.MSG_DONTWAIT), tracee.W(0), tracee.W(0)))
			replies = append(replies, reply)
		}
		if _, err := w.stub.Run(&b); err != nil {
			return nil, err
		}
		for i, reply := range replies {
			err := b.Err(reads[i] - 1)
			if err == nil {
				err = b.Err(reads[i])
			}
			if err == nil {
				err = answer(b.At(reply, int(b.Calls[reads[i]].Ret)))
			}
			out = append(out, err)
		}
		list = list[n:]
	}
	return out, nil
}

// answer reads an acknowledgement (struct nlmsgerr).
func answer(b []byte) error {
	if len(b) < unix.NLMSG_HDRLEN+4 || ne.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return errTruncated
	}
	errno := -int32(ne.Uint32(b[unix.NLMSG_HDRLEN:]))
	if errno == 0 {
		return nil
	}
	err := error(unix.Errno(errno))
	const behind = unix.NLMSG_HDRLEN + 4 + unix.NLMSG_HDRLEN // the request's head
	if len(b) > behind && ne.Uint16(b[6:])&unix.NLM_F_ACK_TLVS != 0 {
		list, _ := attrs(b[behind:])
		if a := find(list, unix.NLMSGERR_ATTR_MSG); a != nil {
			err = fmt.Errorf("%w (%s)", err, unix.ByteSliceToString(a.data))
		}
	}
	return err
}

// one has one message carried out.
func (w *wire) one(r request) error {
	errs, err := w.send([]request{r})
	if err != nil {
		return err
	}
	return errs[0]
}
