package runtime

import (
	"io"
	"log/slog"
	"sync"

	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// learned is what only the kernel's memory tells of stopped tasks. The means to
// read it take long to make: that is done while the container runs, if a look at
// its tasks says that it will be needed.
type learned struct {
	log                   *slog.Logger
	blocks, timers, undos question[*bpf.Question]
	threads               question[*bpf.Question]
	many                  bool // of threads, so that threads is expected
	terminals             question[*bpf.Terminals]
	rings                 question[*bpf.AIO]
	queues                question[*bpf.Queues]
	sockets               question[*bpf.TCPSockets]
	allBlocks             func() map[int]bpf.RestartBlock
	allThreads            func() map[int]bpf.Thread
}

// question is one that is loaded in time if it is expected, else when it is asked.
type question[Q io.Closer] struct {
	load   func() (Q, error)
	once   sync.Once
	wait   sync.WaitGroup
	q      Q
	err    error
	loaded bool
}

func (q *question[Q]) ready() (Q, error) {
	q.once.Do(func() {
		q.q, q.err = q.load()
		q.loaded = q.err == nil
	})
	return q.q, q.err
}

func (q *question[Q]) expect() { q.wait.Go(func() { _, _ = q.ready() }) }

func (q *question[Q]) close() {
	q.wait.Wait()
	if q.loaded {
		_ = q.q.Close()
	}
}

func newLearned(log *slog.Logger) *learned {
	l := &learned{log: log}
	l.blocks.load, l.timers.load, l.undos.load, l.terminals.load, l.rings.load = bpf.RestartBlocks, bpf.Timers, bpf.SemUndos, bpf.NewTerminals, bpf.NewAIO
	l.queues.load, l.sockets.load, l.threads.load = bpf.NewQueues, bpf.NewTCPSockets, bpf.Threads
	l.allBlocks = sync.OnceValue(func() map[int]bpf.RestartBlock {
		return ask(l, &l.blocks, (*bpf.Question).RestartBlocks)
	})
	l.allThreads = sync.OnceValue(func() map[int]bpf.Thread {
		return ask(l, &l.threads, (*bpf.Question).Threads)
	})
	return l
}

// manyThreads is how many a process must have for the question about all to take
// less time than asking each.
const manyThreads = 32

// expect looks at the running threads of pids and begins to prepare.
func (l *learned) expect(pids []int) {
	var blocks, timers bool
	for _, pid := range pids {
		timers = timers || task.HasTimers(pid)
		tids, _ := task.Threads(pid)
		l.many = l.many || len(tids) >= manyThreads
		for _, tid := range tids {
			blocks = blocks || task.AsksForBlock(tid)
		}
	}
	if blocks {
		l.blocks.expect()
	}
	if timers {
		l.timers.expect()
	}
	if l.many {
		l.threads.expect()
	}
}

// ready waits until all that was expected is there.
func (l *learned) ready() {
	l.blocks.wait.Wait()
	l.timers.wait.Wait()
	l.undos.wait.Wait()
	l.terminals.wait.Wait()
	l.queues.wait.Wait()
	l.threads.wait.Wait()
}

func (l *learned) close() {
	l.blocks.close()
	l.timers.close()
	l.undos.close()
	l.terminals.close()
	l.rings.close()
	l.queues.close()
	l.sockets.close()
	l.threads.close()
}

// ask asks. Without an answer the caller warns.
func ask[Q io.Closer, T any](l *learned, q *question[Q], f func(Q) (T, error)) (answer T) {
	loaded, err := q.ready()
	if err == nil {
		answer, err = f(loaded)
	}
	if err != nil {
		l.log.Debug("tasks cannot be read by BPF", "error", err)
	}
	return answer
}

// block is the restart block of a stopped thread.
func (l *learned) block(tid int) (bpf.RestartBlock, bool) {
	b, ok := l.allBlocks()[tid]
	return b, ok
}

// kept is what the kernel keeps of a stopped thread.
func (l *learned) kept(tid int) (t bpf.Thread, ok bool) {
	if l.many {
		t, ok = l.allThreads()[tid]
	}
	return t, ok
}

// timersOf is what the kernel knows of a process's timers now.
func (l *learned) timersOf(pid int) (map[int32]bpf.Timer, bool) {
	all := ask(l, &l.timers, (*bpf.Question).Timers)
	return all[pid], all != nil
}

// unread is what waits in the terminals, nil if that cannot be told.
func (l *learned) unread() map[bpf.Side]bpf.Unread {
	return ask(l, &l.terminals, (*bpf.Terminals).Unread)
}

// alikeSockets tells which sockets of TCP of a network namespace are alike.
func (l *learned) alikeSockets(netns string) (alike map[uint64]int, err error) {
	q, err := l.sockets.ready()
	if err == nil {
		err = nsutil.Inside(netns, func() error { alike, err = q.Alike(); return err })
	}
	if err != nil {
		l.log.Debug("sockets cannot be compared by BPF", "error", err)
	}
	return alike, err
}

// contextsOf is what the kernel knows of a process's contexts of asynchronous I/O now.
func (l *learned) contextsOf(pid int) (map[uint64]bpf.AIOContext, error) {
	q, err := l.rings.ready()
	if err != nil {
		return nil, err
	}
	all, err := q.Contexts()
	return all[pid], err
}
