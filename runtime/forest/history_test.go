package forest

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

var (
	histories   = flag.Int("histories", 40000, "histories that TestHistories plays")
	historySeed = flag.Uint64("history-seed", 0, "seed of the first history; 0 takes one from the clock")
	historySize = flag.Int("history-size", 0, "forks in each history; 0 lets them grow from 1 to 60")
)

// threads are numbers in use as tids.
var threads = []int{3, 5, 401}

// A history is a random life of a pid namespace.
type history struct {
	*kernel
	rand    *rand.Rand
	sharing bool // processes share tables
	execs   bool // and leave address spaces by execve
	guests  bool // processes are brought in from outside
	eager   bool // processes call setsid more often than anything but fork
	wrapped bool // pids come in any order, as after wrap-arounds of the pid counter
	nextPid int  // the lowest where wrapped
	log     []call
}

// newHistory starts with a root of one of the kinds Grow knows.
func newHistory(seed uint64) *history {
	r := rand.New(rand.NewPCG(seed, 0))
	h := &history{rand: r, wrapped: r.IntN(2) == 0, eager: r.IntN(4) == 0, nextPid: 2}
	h.kernel = newKernel(1, r.IntN(4) > 0)
	if r.IntN(8) == 0 {
		h.kernel = newKernel(700, true)
		h.addNamespaceInit()
		h.procs[700].subreaper = true
		h.nextPid = 701
	}
	h.hold(threads...)
	return h
}

// live runs the history until it has made size forks.
func (h *history) live(size int) {
	for forks := 0; forks < size; {
		h.act(&forks)
	}
}

// pick returns any process of the container that can act.
func (h *history) pick() int {
	for {
		p := h.all[h.rand.IntN(len(h.all))]
		if !p.zombie && !h.isOuter(p.pid) {
			return p.pid
		}
	}
}

// isOuter says that pid is the init above a root that is not pid 1.
func (h *history) isOuter(pid int) bool {
	return h.procs[700] != nil && h.procs[700].parent != nil && pid == 1
}

func (h *history) newPid() int {
	for {
		pid := h.nextPid
		if h.wrapped {
			pid = h.nextPid + h.rand.IntN(400)
		} else {
			h.nextPid++
		}
		if h.inUse[pid] == 0 {
			return pid
		}
	}
}

// A call is one thing a process of a history did, or tried to.
type call struct {
	what     string
	pid      int
	arg, grp int
	tables   Tables
	err      error
}

func (c call) String() string {
	if c.err != nil {
		return fmt.Sprintf("%d: %s %d %d %v = %v", c.pid, c.what, c.arg, c.grp, c.tables, c.err)
	}
	return fmt.Sprintf("%d: %s %d %d %v", c.pid, c.what, c.arg, c.grp, c.tables)
}

// do makes a call in the simulated kernel.
func (k *kernel) do(c call) error {
	switch c.what {
	case "fork", "fork sibling":
		return k.fork(c.pid, c.arg, c.tables, c.what == "fork sibling")
	case "setsid":
		return k.setsid(c.pid)
	case "setpgid":
		return k.setpgid(c.pid, c.arg, c.grp)
	case "subreaper":
		return k.setSubreaper(c.pid, c.arg != 0)
	case "exit":
		return k.exit(c.pid)
	case "leave":
		return k.leave(c.pid, c.tables)
	case "reap":
		return k.reap(c.pid, c.arg)
	case "enter":
		return k.enter(c.pid)
	}
	return fmt.Errorf("call %q", c.what)
}

// call makes a call, which may fail as it may in life.
func (h *history) call(what string, pid, arg, grp int) {
	c := call{what, pid, arg, grp, h.someTables(what), nil}
	c.err = h.do(c)
	h.log = append(h.log, c)
}

// someTables are what a call shares or leaves.
func (h *history) someTables(what string) (s Tables) {
	if !h.sharing {
		return 0
	}
	some := Tables(h.rand.IntN(allTables + 1))
	switch what {
	case "fork", "fork sibling":
		if h.rand.IntN(2) == 0 {
			return 0
		}
		return some
	case "leave":
		if h.execs && h.rand.IntN(2) == 0 {
			return 1<<MM | 1<<Sighand | 1<<Files
		}
		return some &^ (1<<MM | 1<<Sighand)
	}
	return 0
}

// act lets a process do something.
func (h *history) act(forks *int) {
	pid := h.pick()
	parent := h.procs[pid].parent
	root := parent == nil || h.isOuter(parent.pid)
	kind := h.rand.IntN(16)
	if h.guests && !h.isOuter(1) && h.rand.IntN(20) == 0 {
		guest := h.newPid()
		h.call("enter", guest, 0, 0)
		h.call("setsid", guest, 0, 0)
		*forks++
		return
	}
	if h.eager && kind >= 8 && kind <= 11 {
		kind = 6
	}
	switch {
	case kind < 5:
		h.call("fork", pid, h.newPid(), 0)
		*forks++
	case kind < 6 && !root:
		h.call("fork sibling", pid, h.newPid(), 0)
		*forks++
	case kind < 8 && !root: // a root that calls setsid later is not one libcontainer makes
		h.call("setsid", pid, 0, 0)
	case kind < 10:
		h.actSetpgid(pid)
	case kind < 12 && (!root || !h.isOuter(1)): // else orphans of the root would become roots
		h.call("subreaper", pid, h.rand.IntN(2), 0)
	case kind < 15 && (!root || parent == nil && pid != h.init.pid):
		h.call("exit", pid, 0, 0)
		if parent != nil && h.rand.IntN(4) > 0 {
			h.call("reap", parent.pid, pid, 0)
		}
	case h.sharing && h.rand.IntN(3) > 0:
		h.call("leave", pid, 0, 0)
	default:
		h.call("reap", pid, h.all[h.rand.IntN(len(h.all))].pid, 0)
	}
}

func (h *history) actSetpgid(pid int) {
	target, pgid := h.pick(), h.pick()
	if h.rand.IntN(2) == 0 {
		target = pid
	}
	switch h.rand.IntN(3) {
	case 0:
		pgid = 0
	case 1:
		pgid = h.procs[pgid].pgid
	}
	h.call("setpgid", pid, target, pgid)
}

// state ends the history and returns the container's processes in random order.
func (h *history) state() []Process {
	if h.isOuter(1) {
		h.removeNamespaceInit()
	}
	list := h.list()
	h.rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

func checkState(state []Process, reserved []int) error {
	plan, err := Grow(state, reserved)
	if err != nil {
		return err
	}
	for _, ghost := range plan.Ghosts {
		for _, id := range reserved {
			if ghost == id {
				return fmt.Errorf("ghost %d has a reserved pid", ghost)
			}
		}
	}
	return play(plan, state)
}

// TestHistories: whatever a kernel can show, a plan reaches. Small histories come first, so that the
// first failure is about the smallest.
func TestHistories(t *testing.T) {
	seed := *historySeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	for i := range *histories {
		h := newHistory(seed + uint64(i))
		h.guests = i%2 == 0
		size := 1 + i*60 / *histories
		if *historySize > 0 {
			size = *historySize
		}
		h.live(size)
		state := h.state()
		if err := checkState(state, threads); err != nil {
			t.Fatalf("-histories 1 -history-seed %d -history-size %d: %v\nhistory: %v\nstate: %+v",
				seed+uint64(i), size, err, h.log, state)
		}
	}
	t.Logf("%d histories from seed %d", *histories, seed)
}

// TestSharing: what processes share is shared again or refused, and refused are only few: where the way of
// an address space leads through processes that have left it by execve, or where it meets with sessions.
func TestSharing(t *testing.T) {
	seed := *historySeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	refused, count := map[bool]int{}, *histories/4+1
	for i := range count {
		h := newHistory(seed + uint64(i))
		h.sharing, h.execs = true, i%2 == 0
		size := 1 + i*20/count
		if *historySize > 0 {
			size = *historySize
		}
		h.live(size)
		state := h.state()
		err := checkState(state, threads)
		var unreachable *Unreachable
		if errors.As(err, &unreachable) {
			refused[h.execs]++
		} else if err != nil {
			t.Fatalf("-histories 1 -history-seed %d -history-size %d: %v\nhistory: %v\nstate: %+v", seed+uint64(i), size, err, h.log, state)
		}
	}
	if refused[true] > count/100+1 || refused[false] > count/400+1 {
		t.Errorf("too many are refused")
	}
	t.Logf("of %d histories from seed %d refused: %d with execve, %d without", count, seed, refused[true], refused[false])
}
