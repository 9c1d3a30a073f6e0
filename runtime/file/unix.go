package file

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/sock"
)

// unixSocket is a unix socket of the container: what it is by itself the room of
// sockets tells, who its peer is shows when all are known.
type unixSocket struct {
	*Description
	inode   uint64
	diag    *sock.Diagnosis
	pending bool // its connection waits to be accepted in the container
	paired  bool // its connection is recorded
	lost    bool // what is unread in it goes with its peer
	named   bool // in a mount namespace that a task has made
}

func (u *unixSocket) is(kind int32) bool { return u.Record.Socket.Type == kind }

// note keeps a unix socket for when all are known.
func (s *Set) note(d *Description, in *sock.Inside) error {
	if d.Record.Socket.Family != unix.AF_UNIX {
		return nil
	}
	diag, err := in.Diagnose(d.seen.stat.Ino)
	if err != nil {
		return err
	}
	u := &unixSocket{Description: d, inode: d.seen.stat.Ino, diag: diag, named: s.socketIn != nil}
	s.unixes = append(s.unixes, u)
	s.unixOf[u.inode] = u
	return nil
}

// connectUnix finds out which unix sockets are connected to each other.
func (s *Set) connectUnix() error {
	for _, u := range s.unixes {
		for _, inode := range u.diag.Pending {
			if from := s.unixOf[inode]; from != nil && inode != 0 {
				from.pending = true
			}
		}
	}
	for _, u := range s.unixes {
		err := s.connectOne(u)
		if err == nil {
			err = s.acceptLater(u)
		}
		if err != nil {
			return fail.In(u.seen.proc.Name, fail.On(u.seen.object(), err))
		}
	}
	return nil
}

// connection records that from, which may be closed, has to as its peer.
func (s *Set) connection(from, to *unixSocket, mutual bool) {
	rec := &image.Connection{Mutual: mutual}
	s.connections = append(s.connections, &object.Object{Type: image.TypeConnection, Record: rec, Complete: func() {
		rec.From, rec.To = refOf(from), refOf(to)
	}})
	if from != nil {
		from.paired = true
	}
	if to != nil && mutual {
		to.paired = true
	}
}

func refOf(u *unixSocket) image.Ref {
	if u == nil {
		return 0
	}
	return u.Ref
}

func (s *Set) connectOne(u *unixSocket) error {
	if !u.diag.HasPeer || u.paired || u.pending {
		return nil
	}
	peer := s.unixOf[u.diag.Peer]
	switch {
	case u.diag.Peer == 0:
		return s.peerGone(u)
	case peer == nil:
		return s.peerOutside(u)
	case u.is(unix.SOCK_DGRAM) && !madeAsPair(u, peer):
		if len(peer.Record.Socket.Address) <= 2 {
			return fail.Refuse("", "a datagram socket without a name is its peer, which has another one itself", "close it before the checkpoint")
		}
		s.connection(u, peer, false)
	default:
		from, to := u, peer
		if s.accepted(u, peer.Record.Socket.Address) {
			from, to = peer, u
		}
		if !to.is(unix.SOCK_DGRAM) {
			to.Record.Socket.Path = "" // the file is the listening socket's
		}
		s.connection(from, to, true)
	}
	return nil
}

// madeAsPair reports datagram sockets that socketpair(2) has made and that are
// still each other's peers: only then have they credentials.
func madeAsPair(a, b *unixSocket) bool {
	return a.diag.Peer == b.inode && b.diag.Peer == a.inode && a.Record.Socket.Unix.Creds != nil && b.Record.Socket.Unix.Creds != nil
}

// accepted tells whether an end of a connection was made by accept(2): it then
// has the name of the listening socket.
func (s *Set) accepted(u *unixSocket, peer []byte) bool {
	mine := u.Record.Socket.Address
	if u.is(unix.SOCK_DGRAM) || len(mine) <= 2 || len(peer) <= 2 {
		return len(mine) > len(peer)
	}
	return slices.ContainsFunc(s.unixes, func(l *unixSocket) bool {
		return l.Record.Socket.Listening && slices.Equal(l.Record.Socket.Address, mine)
	})
}

// shutAll is SHUTDOWN_MASK of include/net/sock.h, which the end of a peer leaves.
const shutAll = 3

func (s *Set) peerGone(u *unixSocket) error {
	if !u.is(unix.SOCK_DGRAM) && u.diag.Shutdown != shutAll && u.diag.Peer == 0 {
		return fail.Refuse("", "its connection waits to be accepted outside the container", "close it before the checkpoint")
	}
	f, err := u.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	peer, err := sock.PeerAddress(f)
	if err != nil {
		return err
	}
	u.Record.Socket.Unix.Peer = peer
	if !u.is(unix.SOCK_DGRAM) && s.accepted(u, peer) {
		u.Record.Socket.Path = ""
		s.connection(nil, u, false)
		return nil
	}
	s.connection(u, nil, false)
	return nil
}

// peerOutside is for a socket whose peer the container does not have. One that was
// accepted, or whose peer has no path that leads to a socket here, has no way back.
func (s *Set) peerOutside(u *unixSocket) error {
	f, err := u.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	if s.Sockets.Outside != "" {
		return s.leaveOutside(u, f)
	}
	what := "a unix socket without a name"
	if address, err := sock.PeerAddress(f); err == nil {
		if name := sock.UnixName(address); name != "" {
			what = "unix:" + name
		} else if name := sock.UnixName(u.Record.Socket.Address); name != "" {
			what = "a client of unix:" + name
		}
	}
	return fail.Refuse("", "its peer, "+what+", is outside the container", "give --ext-unix-sk=reconnect or disconnect, or close the connection before the checkpoint")
}

func (s *Set) leaveOutside(u *unixSocket, f *os.File) error {
	peer, err := sock.PeerAddress(f)
	if err != nil {
		return err
	}
	name := sock.UnixName(peer)
	if s.Sockets.Outside == sock.Reconnect {
		st, err := s.lstat(name)
		if filepath.IsAbs(name) && err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			u.Record.Socket.Unix.Peer, u.Record.Socket.Unix.Reconnect = peer, true
			u.lost = true
			return nil
		}
		s.Warnings = append(s.Warnings, fmt.Sprintf("%s: fd %d: its peer outside the container has no path there, and is closed instead of connected to again", u.seen.proc.Name, u.seen.fd))
	}
	return s.peerGone(u)
}

// acceptLater records the connections that a listening socket has yet to accept.
// What clients have sent lies where no descriptor leads.
func (s *Set) acceptLater(u *unixSocket) error {
	if len(u.diag.Pending) > 0 && u.named {
		return fail.Refuse("", "a connection waits to be accepted, and its file lies in a mount namespace that a task has made; that is not supported yet", "let the program accept it")
	}
	for _, inode := range u.diag.Pending {
		from := s.unixOf[inode]
		if inode != 0 && from == nil {
			return fail.Refuse("", "a connection from outside the container waits to be accepted", "let the program accept it, or stop the client")
		}
		if n := s.sockets.Sent(inode); n > 0 {
			return fail.Refuse("", fmt.Sprintf("a connection waits to be accepted over which %d bytes have been sent; that is not supported yet", n), "let the program accept it")
		}
		s.connection(from, u, false)
	}
	if u.Record.Socket.Listening && u.seen.number("scm_fds", 10) > 0 {
		return fail.Refuse("", "descriptors have been sent over a connection that waits to be accepted", "let the program accept it")
	}
	return nil
}

// elsewhere finds the file of a socket in a mount namespace that a task has made,
// and keeps that for whom it looks.
func (s *Set) elsewhere(fd int, path string) bool {
	var st unix.Stat_t
	if s.Views == nil || unix.Fstat(fd, &st) != nil {
		return false
	}
	for _, v := range s.Views() {
		if resolves(v.Root, path, &st) == nil {
			s.socketIn = v
			return true
		}
	}
	return false
}

// inside is what the room of sockets must know of the container.
func (s *Set) insideOf(pid int) *sock.Inside {
	if s.sockets == nil {
		s.sockets = &sock.Inside{NetNS: fmt.Sprintf("/proc/%d/ns/net", pid), Lstat: s.lstat, Elsewhere: s.elsewhere, Choices: s.Sockets, IDs: s.IDs, Pid: func(host int32) int32 {
			if s.Inner == nil {
				return 0
			}
			return s.Inner(host)
		}}
	}
	return s.sockets
}
