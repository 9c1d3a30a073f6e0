package sysv

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	semSize  = 104 // sizeof(struct semid64_ds), asm/sembuf.h of x86
	semCount = 80  // sem_nsems in it
	getAll   = 13
	setAll   = 17
	semUndo  = 0x1000 // SEM_UNDO
)

func (s *Set) readSet(id int, ids IDs) error {
	b := make([]byte, semSize)
	if err := control(unix.SYS_SEMCTL, id, ipcStat, b); err != nil {
		return gone(err)
	}
	values := make([]byte, 2*binary.NativeEndian.Uint64(b[semCount:]))
	if err := control(unix.SYS_SEMCTL, id, getAll, values); err != nil {
		return gone(err)
	}
	rec := &image.SemSet{Perm: perm(id, b, ids)}
	for i := 0; i < len(values); i += 2 {
		rec.Values = append(rec.Values, binary.NativeEndian.Uint16(values[i:]))
	}
	s.Sets = append(s.Sets, rec)
	s.objects = append(s.objects, &object.Object{Type: image.TypeSemSet, Record: rec, Complete: func() { rec.Perm.NS = s.ns() }})
	return nil
}

func (m *Maker) makeSet(rec *image.SemSet) error {
	p := &rec.Perm
	err := m.create("sem", p, func(b *tracee.Batch) int {
		return b.Add(unix.SYS_SEMGET, tracee.W(p.Key), tracee.W(len(rec.Values)), tracee.W(uint32(ipcFlags)|p.Mode))
	})
	if err != nil {
		return err
	}
	var values []byte
	for _, v := range rec.Values {
		values = binary.NativeEndian.AppendUint16(values, v)
	}
	_, err = m.Stub.AsItself(func(b *tracee.Batch) {
		b.Add(unix.SYS_SEMCTL, tracee.W(p.ID), tracee.W(0), tracee.W(setAll), b.Put(values))
		if given(p) {
			b.Add(unix.SYS_SEMCTL, tracee.W(p.ID), tracee.W(0), tracee.W(ipcSet), b.Put(permBytes(p, semSize)))
		}
	})
	return err
}

// largestStep is what a semaphore of any value can be changed by in one of both
// directions: half of SEMVMX.
const largestStep = 16383

// Undo adds the calls that give the thread which makes them what undo list n has
// to take back: operations that leave every semaphore as it is, of which only one
// half is undone. (SETVAL would clear all adjustments, so the values come first.)
func (m *Maker) Undo(b *tracee.Batch, n uint32) {
	for _, ref := range m.refs {
		rec, ok := m.head.Objects[ref].(*image.SemSet)
		if !ok {
			continue
		}
		for _, u := range rec.Undo {
			if u.List == n {
				adjust(b, rec, u)
			}
		}
	}
}

func adjust(b *tracee.Batch, rec *image.SemSet, u image.SemUndo) {
	for left := int(u.Adjust); left != 0; {
		step := max(min(left, largestStep), -largestStep)
		left -= step
		undone, plain := operation(u.Number, -step, semUndo), operation(u.Number, step, 0)
		first, second := undone, plain
		// What adds comes first where the value leaves room for it.
		if room := int(rec.Values[u.Number])+abs(step) <= 32767; room == (step > 0) {
			first, second = plain, undone
		}
		b.Add(unix.SYS_SEMOP, tracee.W(rec.Perm.ID), b.Put(append(first, second...)), tracee.W(2))
	}
}

func abs(n int) int { return max(n, -n) }

// operation is struct sembuf.
func operation(num uint16, op int, flags uint16) []byte {
	b := binary.NativeEndian.AppendUint16(nil, num)
	b = binary.NativeEndian.AppendUint16(b, uint16(int16(op)))
	return binary.NativeEndian.AppendUint16(b, flags)
}
