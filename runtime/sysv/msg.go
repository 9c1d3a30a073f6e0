package sysv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	msgSize     = 120 // sizeof(struct msqid64_ds), asm/msgbuf.h of x86
	msgMaxBytes = 88  // msg_qbytes in it

	msgCopy = 0o40000 // MSG_COPY, Linux 3.8
)

// queue is a message queue and the texts of its messages.
type queue struct {
	object.Object
	record *image.Messages
	text   []byte
}

// readQueue copies the messages and leaves them where they are.
func (s *Set) readQueue(id int, ids IDs) error {
	b := make([]byte, msgSize)
	if err := control(unix.SYS_MSGCTL, id, ipcStat, b); err != nil {
		return gone(err)
	}
	// A message that is longer, from when the limit was higher, could not be sent
	// again either.
	longest, err := limit("msgmax")
	if err != nil {
		return err
	}
	q := &queue{record: &image.Messages{Perm: perm(id, b, ids), MaxBytes: binary.NativeEndian.Uint64(b[msgMaxBytes:])}}
	q.Object = object.Object{Type: image.TypeMessages, Record: q.record, Complete: func() { q.record.Perm.NS = s.ns() }}
	buf := make([]byte, 8+longest)
	for i := 0; ; i++ {
		n, _, errno := unix.Syscall6(unix.SYS_MSGRCV, uintptr(id), uintptr(unsafe.Pointer(&buf[0])), uintptr(longest), uintptr(i), msgCopy|unix.IPC_NOWAIT, 0)
		if errno == unix.ENOMSG {
			break
		}
		if errno != 0 {
			return gone(fmt.Errorf("copy message %d: %w", i, errno))
		}
		q.record.Messages = append(q.record.Messages, image.Message{Type: int64(binary.NativeEndian.Uint64(buf)), Size: uint32(n)})
		q.text = append(q.text, buf[8:8+n]...)
	}
	s.queues = append(s.queues, q)
	s.objects = append(s.objects, &q.Object)
	return nil
}

// Contents writes the messages' texts.
func (s *Set) Contents(w *image.Writer) error {
	for _, q := range s.queues {
		for at := 0; at < len(q.text); at += image.MaxRaw {
			if err := w.Bytes(q.Ref, uint64(at), q.text[at:min(at+image.MaxRaw, len(q.text))]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *Maker) makeQueue(rec *image.Messages) error {
	p := &rec.Perm
	return m.create("msg", p, func(b *tracee.Batch) int {
		return b.Add(unix.SYS_MSGGET, tracee.W(p.Key), tracee.W(uint32(ipcFlags)|p.Mode))
	})
}

// Fill takes a part of a queue's texts, which come in order.
func (m *Maker) Fill(ref image.Ref, data []byte) { m.texts[ref] = append(m.texts[ref], data...) }

// Send puts the messages into their queues, when all texts are there, and gives
// each its limit and owner.
func (m *Maker) Send() error {
	for _, ref := range m.refs {
		rec, ok := m.head.Objects[ref].(*image.Messages)
		if !ok {
			continue
		}
		if err := m.send(rec, m.texts[ref]); err != nil {
			return fail.On(fmt.Sprintf("System V msg %d", rec.Perm.ID), err)
		}
	}
	return nil
}

// sendChunk bounds the messages and bytes of one batch.
const sendChunk = 1 << 20

func (m *Maker) send(rec *image.Messages, text []byte) error {
	set := func(b *tracee.Batch) {
		ds := permBytes(&rec.Perm, msgSize)
		binary.NativeEndian.PutUint64(ds[msgMaxBytes:], rec.MaxBytes)
		b.Add(unix.SYS_MSGCTL, tracee.W(rec.Perm.ID), tracee.W(ipcSet), b.Put(ds))
	}
	if rec.MaxBytes > m.MaxBytes {
		return fail.Refuse("", fmt.Sprintf("it may hold %d bytes, and the bundle allows %d", rec.MaxBytes, m.MaxBytes), "raise kernel.msgmnb in the bundle (linux.sysctl), or give CAP_SYS_RESOURCE")
	}
	// The limit is set before the messages if they need it, and lowered behind.
	if rec.MaxBytes >= rec.Bytes() {
		if _, err := m.Stub.AsItself(set); err != nil {
			return err
		}
	}
	for left := rec.Messages; len(left) > 0; {
		n, size := 0, 0
		for n < len(left) && n < 4096 && (n == 0 || size+int(left[n].Size) <= sendChunk) {
			size += int(left[n].Size)
			n++
		}
		_, err := m.Stub.AsItself(func(b *tracee.Batch) {
			for _, one := range left[:n] {
				body := append(binary.NativeEndian.AppendUint64(nil, uint64(one.Type)), text[:one.Size]...)
				text = text[one.Size:]
				b.Add(unix.SYS_MSGSND, tracee.W(rec.Perm.ID), b.Put(body), tracee.W(one.Size), tracee.W(unix.IPC_NOWAIT))
			}
		})
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EAGAIN) {
			return &fail.Error{Cause: fmt.Errorf("its messages do not fit: %w", err), Remedy: "raise kernel.msgmax and kernel.msgmnb in the bundle (linux.sysctl)"}
		}
		if err != nil {
			return err
		}
		left = left[n:]
	}
	if rec.MaxBytes < rec.Bytes() {
		_, err := m.Stub.AsItself(set)
		return err
	}
	return nil
}
