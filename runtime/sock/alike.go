package sock

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

// A server has thousands of connections that differ in their addresses and numbers
// only. What a program can set of each are some hundred options; asked one by one they
// take longer than everything else about it. Where the kernel's memory shows which
// sockets are alike, one of them is asked for all.

// Alike tells which sockets of TCP of a network namespace have, as they are now, the
// same state and the same options: those with the same number. They are known by their
// inodes, and one that is not there is like no other.
type Alike func(netns string) (map[uint64]int, error)

// worthLooking is how many connections are read one by one before it is asked which
// of the others are alike.
const worthLooking = 100

// model is the record of a connection that is like another one in everything that
// can be set, nil if there is none.
func (in *Inside) model(inode uint64) *image.Socket {
	class, ok := in.class(inode)
	if !ok {
		return nil
	}
	return in.models[class]
}

func (in *Inside) class(inode uint64) (int, bool) {
	if in.met < worthLooking || in.Alike == nil {
		return 0, false
	}
	if in.classes == nil {
		// Without an answer each is read by itself.
		in.classes = map[uint64]int{}
		if all, err := in.Alike(in.NetNS); err == nil {
			in.classes = all
		}
	}
	class, ok := in.classes[inode]
	return class, ok
}

// Like reports that the socket of an inode is one of TCP in this network namespace and
// like another one that was read.
func (in *Inside) Like(inode uint64) bool { return in.model(inode) != nil }

// likeModel begins the record of a socket that is like another one.
func likeModel(m *image.Socket) *image.Socket {
	return &image.Socket{Family: m.Family, Type: m.Type, Protocol: m.Protocol, Options: m.Options}
}

// single are options whose values do not hang on the socket alone, but on its route.
var single = []option{{unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, 4}}

// readSingle records those of a socket that is otherwise like another one.
func readSingle(in *Inside, fd int, fam *family, s *image.Socket) error {
	usual, err := in.usual(fam, s)
	if err != nil {
		return err
	}
	return readList(single, usual, fd, s)
}

// keepModel notes a connection that was read, for those that are like it. One with
// buffers of its own sizes is none: the others' may be others.
func (in *Inside) keepModel(inode uint64, s *image.Socket) {
	if s.TCP == nil || s.TCP.State == tcpClose {
		return
	}
	in.met++
	class, ok := in.class(inode)
	if !ok || slices.ContainsFunc(s.Options, func(o image.SocketOpt) bool {
		return o.Level == unix.SOL_SOCKET && (o.Name == unix.SO_SNDBUF || o.Name == unix.SO_RCVBUF)
	}) {
		return
	}
	m := likeModel(s)
	m.Options = slices.DeleteFunc(slices.Clone(s.Options), func(o image.SocketOpt) bool {
		return slices.ContainsFunc(single, given(o).fits)
	})
	m.Options = slices.Clip(m.Options)
	if in.models == nil {
		in.models = map[int]*image.Socket{}
	}
	in.models[class] = m
}
