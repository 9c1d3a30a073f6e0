package runtime

import (
	"log/slog"
	"sync"

	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// learned is what only the kernel's memory tells of the stopped threads. The
// means to read it take long to make: that is done while the container runs, if
// a look at what its threads wait for says that it will be needed.
type learned struct {
	log      *slog.Logger
	loading  sync.Once
	ready    sync.WaitGroup
	question *bpf.Question
	err      error

	blocks func() map[int]bpf.RestartBlock
}

func newLearned(log *slog.Logger) *learned {
	l := &learned{log: log}
	l.blocks = sync.OnceValue(l.ask)
	return l
}

func (l *learned) load() {
	l.loading.Do(func() { l.question, l.err = bpf.RestartBlocks() })
}

func (l *learned) close() {
	l.ready.Wait()
	if l.question != nil {
		_ = l.question.Close()
	}
}

// expect looks at the running threads of pids and begins to prepare.
func (l *learned) expect(pids []int) {
	for _, pid := range pids {
		tids, _ := task.Threads(pid)
		for _, tid := range tids {
			if task.AsksForBlock(tid) {
				l.ready.Go(l.load)
				return
			}
		}
	}
}

// ask reads every restart block at once. Without an answer the caller warns.
func (l *learned) ask() (blocks map[int]bpf.RestartBlock) {
	l.load()
	err := l.err
	if err == nil {
		blocks, err = l.question.RestartBlocks()
	}
	if err != nil {
		l.log.Debug("restart blocks cannot be read", "error", err)
	}
	return blocks
}

// block is the restart block of a stopped thread.
func (l *learned) block(tid int) (bpf.RestartBlock, bool) {
	b, ok := l.blocks()[tid]
	return b, ok
}
