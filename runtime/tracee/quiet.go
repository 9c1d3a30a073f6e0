package tracee

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fault"
)

// A seccomp filter is suspended while we trace, and in force again the moment we
// die. A thread that would be punished for a call of the cave or of a batch must
// not come upon one by itself. So each such call waits behind a gate, for a word
// that we write while the thread, which runs in a loop, looks: it makes the call
// within a fraction of a microsecond, and we do not die, and are not unhooked
// from it by the kernel, in so short a time. Nor is it woken for the call, as from
// a stop, which on a busy machine may take any time.

// PointGate is the fault point in front of each opening of a gate.
const PointGate = "tracee.live.gate"

// unmade is the result of an entry that was not run yet.
const unmade = uint64(1) << 63

// learnFilter finds out what of the thread's work its filters would punish.
func (v *visit) learnFilter(mode string) error {
	if mode == "0" {
		return nil
	}
	filters, err := v.Filters()
	if err != nil {
		return err
	}
	strict := mode == "1"
	v.punished = func(nr uintptr, args [6]uint64) bool { return strict || punishes(filters, nr, args) }
	self := [6]uint64{uint64(v.id.tgid), uint64(v.id.tid), uint64(v.report)}
	v.quiet = v.report == 0 ||
		v.punished(unix.SYS_TGKILL, self) ||
		v.punished(unix.SYS_MMAP, [6]uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, ^uint64(0)}) ||
		v.punished(unix.SYS_MUNMAP, [6]uint64{1 << 32, 4096}) ||
		v.punished(unix.SYS_RT_SIGPROCMASK, [6]uint64{unix.SIG_SETMASK, 1 << 32, 0, 8})
	return nil
}

// enterQuietly is enter for a quiet thread: parked where registers are restored
// without a call, its mask left alone.
func (v *visit) enterQuietly(view Regs) error {
	parked := view
	parked.Rip, parked.Cs = v.slot+places.last, userCS64
	steps := []struct {
		point string
		do    func() error
	}{
		{PointSlot, func() error { return v.live.cave.write(v.slot, slotImage(&view, v.mask, v.id)) }},
		{PointPark, func() error { v.entered = true; return v.SetRegs(parked) }},
		{PointEnter, func() error { return v.SetRegs(quietRegs(view, v.slot, v.size)) }},
		{PointMap, func() error { return v.pass(gateMap, gateRun, nil) }},
	}
	for _, s := range steps {
		if err := step(s.point, s.do); err != nil {
			return err
		}
	}
	return v.mapped()
}

func (v *visit) unmapQuietly() error {
	if !v.now.atGate(gateUnmap) {
		if err := v.arm(0); err != nil {
			return err
		}
		if err := v.pass(gateRun, gateUnmap, nil); err != nil {
			return err
		}
	}
	return v.pass(gateUnmap, gateRest, nil)
}

// guard marks the entries that are to wait for us, and those that were not made.
func (v *visit) guard(b *Batch, mem []byte, data uint64) {
	v.guarded, v.fed = nil, 0
	if v.punished == nil {
		return
	}
	for i := range b.Calls {
		var args [6]uint64
		for j, a := range b.Calls[i].Args {
			args[j] = a.resolve(data)
		}
		if !v.punished(b.Calls[i].Nr, args) {
			continue
		}
		e := mem[i*entrySize:]
		binary.LittleEndian.PutUint64(e[entryFlags:], binary.LittleEndian.Uint64(e[entryFlags:])|entryGuarded)
		v.guarded = append(v.guarded, i)
	}
	if v.guarded != nil {
		for i := range b.Calls {
			binary.LittleEndian.PutUint64(mem[i*entrySize+entryRet:], unmade)
		}
	}
}

// settleResults makes entries that were not run look as in any other batch.
func (v *visit) settleResults(b *Batch, mem []byte) {
	for i := range b.Calls {
		if e := mem[i*entrySize+entryRet:]; v.guarded != nil && binary.LittleEndian.Uint64(e) == unmade {
			binary.LittleEndian.PutUint64(e, 0)
		}
	}
}

// atOnce is how many entries are opened together. They take the thread a few
// microseconds; one by one, each would take a change of threads on a machine that
// has but one processor to spare.
const atOnce = 8

// feed opens the entries that are guarded, some at a time when the thread has
// come to them. It returns early if the thread stops, or will make no more.
func (v *visit) feed(b *Batch) error {
	for v.fed < len(v.guarded) {
		more, err := v.arrived(b, v.guarded[v.fed]-1)
		if err != nil || !more {
			return err
		}
		if err := fault.Point(PointGate); err != nil {
			return err
		}
		for _, i := range v.guarded[v.fed:min(v.fed+atOnce, len(v.guarded))] {
			flags := uint64(entryGuarded | entryOpen)
			if b.Calls[i].Tolerate {
				flags |= entryTolerate
			}
			var word [8]byte
			binary.LittleEndian.PutUint64(word[:], flags)
			if err := v.Write(v.page+uint64(i*entrySize)+entryFlags, word[:]); err != nil {
				return err
			}
			v.fed++
		}
	}
	return nil
}

// arrived waits until the thread has made entry i. It is false if the thread has
// stopped, or makes no more entries because that one has failed.
func (v *visit) arrived(b *Batch, i int) (bool, error) {
	if i < 0 {
		return true, nil
	}
	nap := unix.Timespec{Nsec: 20_000}
	for begin := time.Now(); ; {
		ret, err := v.result(i)
		if err != nil {
			return false, err
		}
		if ret != unmade {
			return int64(ret) >= 0 || int64(ret) <= -4096 || b.Calls[i].Tolerate, nil
		}
		if _, stopped, err := v.wait(unix.WNOHANG); stopped || err != nil {
			return false, err
		}
		if waited := time.Since(begin); waited > gatePatience {
			return false, fmt.Errorf("task %d: %w within %v: it does not make its calls", v.Tid, ErrNoStop, waited)
		} else if waited > 50*time.Microsecond {
			_ = unix.Nanosleep(&nap, nil)
		}
	}
}

// gatePatience is how long a thread may take from one gate to the next.
const gatePatience = 2 * time.Second

func (v *visit) result(i int) (uint64, error) {
	var ret [8]byte
	err := v.Read(v.page+uint64(i*entrySize)+entryRet, ret[:])
	return binary.LittleEndian.Uint64(ret[:]), err
}

// pass lets a quiet thread, which is stopped at one gate, through it and stops it
// at the next. b holds what it runs in between, or is nil.
func (v *visit) pass(open, next uint64, b *Batch) error {
	if err := v.Cont(0); err != nil {
		return err
	}
	if err := fault.Point(PointGate); err != nil {
		return errors.Join(err, v.stopAt(open))
	}
	if err := v.openGate(open); err != nil {
		return err
	}
	if b != nil {
		for v.fed < len(v.guarded) {
			fed := v.fed
			err := v.feed(b)
			if err == nil {
				err = v.hush()
			}
			if err != nil {
				return errors.Join(err, v.stopAt(next))
			}
			if v.fed == fed {
				break
			}
		}
	}
	return v.stopAt(next)
}

func (v *visit) openGate(gate uint64) error {
	var word [8]byte
	binary.LittleEndian.PutUint64(word[:], gate)
	return v.live.cave.write(v.slot+slotGo, word[:])
}

// stopAt stops the thread once it waits at a gate.
func (v *visit) stopAt(gate uint64) error {
	for deadline := time.Now().Add(gatePatience); ; {
		if err := v.hush(); err != nil {
			return err
		}
		if err := v.Interrupt(); err != nil {
			return err
		}
		s, err := v.await(time.Second)
		for err == nil && !s.Interrupted() {
			if err = v.silence(s); err == nil {
				s, err = v.await(time.Second)
			}
		}
		if err != nil {
			return err
		}
		if v.now, err = v.Regs(); err != nil {
			return err
		}
		switch {
		case v.now.Rip-v.slot >= slotSize:
			return v.escaped(s)
		case v.now.atGate(gate):
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("task %d: %w: it does not come to its gate", v.Tid, ErrNoStop)
		}
		if err := v.Cont(0); err != nil {
			return err
		}
		time.Sleep(20 * time.Microsecond)
	}
}

// hush puts off a signal that has stopped the thread meanwhile.
func (v *visit) hush() error {
	s, stopped, err := v.wait(unix.WNOHANG)
	if err != nil || !stopped {
		return err
	}
	return v.silence(s)
}

// silence resumes a thread that a signal has stopped. The signal is kept: the
// kernel queues one again that is blocked by the time it would be delivered
// (ptrace_signal in kernel/signal.c). Until then a quiet thread has its own mask.
func (v *visit) silence(s Stop) error {
	if s.Exited {
		return fmt.Errorf("task %d: %w", v.Tid, ErrGone)
	}
	var sig unix.Signal
	if s.Event == 0 && !s.Syscall() {
		sig = s.Signal
		if err := v.SetSigMask(allBut(0)); err != nil {
			return err
		}
	}
	return v.Cont(sig)
}
