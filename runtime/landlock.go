package runtime

import (
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// landlock finds threads that have confined themselves by Landlock. The rules of
// a domain can be read by nobody, so it cannot be made again; a restored thread
// without it would be free.
type landlock struct {
	always   bool // the container's bundle gives CAP_SYS_ADMIN
	once     sync.Once
	ready    sync.WaitGroup
	question *bpf.Landlock
	err      error
}

// may tells threads that can have entered a domain, which takes no_new_privs,
// for ever, or at the time CAP_SYS_ADMIN (landlock_restrict_self(2)).
func (l *landlock) may(s *task.Status) bool {
	return l.always || s.NoNewPrivs || (s.CapEff|s.CapBnd)&(1<<unix.CAP_SYS_ADMIN) != 0
}

// expect begins to prepare the question if the container's init says that it
// will be asked.
func (l *landlock) expect(c *container) {
	l.always = slices.Contains(c.bounding, "CAP_SYS_ADMIN")
	if s, err := task.ReadStatus(c.initPid); err == nil && l.may(s) {
		l.ready.Go(l.load)
	}
}

func (l *landlock) load() {
	l.once.Do(func() {
		if bpf.HasLandlock() {
			l.question, l.err = bpf.NewLandlock()
		}
	})
}

func (l *landlock) close() {
	l.ready.Wait()
	if l.question != nil {
		_ = l.question.Close()
	}
}

// check refuses confined threads.
func (l *landlock) check(n *census, warn func(string, ...any)) error {
	if !slices.ContainsFunc(n.procs, func(p *process) bool { return slices.ContainsFunc(p.status, l.may) }) {
		return nil
	}
	l.load()
	if l.question == nil && l.err == nil {
		return nil // no Landlock here
	}
	var confined map[int]bool
	err := l.err
	if err == nil {
		confined, err = l.question.Threads()
	}
	if err != nil {
		warn("whether threads are confined by Landlock cannot be told, and domains are not in the image: %v", err)
	}
	for _, p := range n.procs {
		for i, tid := range p.tids {
			if confined[tid] {
				return fail.In(p.name(), fail.Refuse(fmt.Sprintf("thread %d", task.Innermost(p.status[i].NSpid)),
					"it is confined by Landlock, whose rules the kernel tells nobody", "start it without Landlock if it is to be checkpointed"))
			}
		}
	}
	return nil
}
