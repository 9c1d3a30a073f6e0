package mm

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// policyChunk bounds the areas that one batch asks about.
const policyChunk = 4096

// AskPolicies returns what asks for the memory policy of every area, in as many
// batches as it takes. /proc/PID/numa_maps would tell as well, after a walk over
// every page of the process. The mode is enough at first: next to no area has
// one of its own.
func (s *Space) AskPolicies() (asks []func(b *tracee.Batch) func()) {
	for first := 0; first < len(s.Record.Areas); first += policyChunk {
		chunk := s.Record.Areas[first:min(first+policyChunk, len(s.Record.Areas))]
		asks = append(asks, func(b *tracee.Batch) func() {
			const ofAddress = 2 // MPOL_F_ADDR
			modes := b.Reserve(8 * len(chunk))
			for i := range chunk {
				b.Try(unix.SYS_GET_MEMPOLICY, modes.Plus(8*i), tracee.W(0), tracee.W(0), tracee.W(chunk[i].Start), tracee.W(ofAddress))
			}
			return func() {
				for i := range chunk {
					if binary.LittleEndian.Uint32(b.At(modes.Plus(8*i), 4)) != 0 {
						s.bound = append(s.bound, first+i)
					}
				}
			}
		})
	}
	return asks
}

// Policies reads the policies of the areas that have one.
func (s *Space) Policies(live *tracee.Live, t *tracee.Thread) error {
	var b tracee.Batch
	var done []func() *image.MemPolicy
	for _, i := range s.bound {
		done = append(done, task.AskPolicy(&b, s.Record.Areas[i].Start))
	}
	if err := live.Run(t, &b); err != nil {
		return err
	}
	for n, i := range s.bound {
		s.Record.Areas[i].Policy = done[n]()
	}
	return nil
}

// bind adds the call that gives an area its policy.
func bind(b *tracee.Batch, a *image.Area) {
	if a.Policy != nil {
		mode, nodes, size := task.PutPolicy(b, a.Policy)
		b.Add(unix.SYS_MBIND, tracee.W(a.Start), tracee.W(a.End-a.Start), mode, nodes, size)
	}
}
