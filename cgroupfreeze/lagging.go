package cgroupfreeze

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Task is a thread that kept its cgroup from freezing.
type Task struct {
	PID, TID int    // in the caller's pid namespace
	NSPID    int    // the process in its own, innermost pid namespace; 0 if unknown
	Comm     string // its name, comm of proc(5)
	State    byte   // its state letter of proc_pid_stat(5) while it should have frozen
	Wchan    string // the kernel function it sleeps in, or "" if not known
	Syscall  string // the number of the system call it is in, or ""
}

func (t Task) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "pid %d (%s)", t.PID, t.Comm)
	if t.TID != t.PID {
		fmt.Fprintf(&b, " thread %d", t.TID)
	}
	if t.NSPID != 0 && t.NSPID != t.PID {
		fmt.Fprintf(&b, ", %d inside", t.NSPID)
	}
	fmt.Fprintf(&b, ", state %c", t.State)
	if t.Wchan != "" {
		fmt.Fprintf(&b, " in %s", t.Wchan)
	}
	if t.Syscall != "" {
		fmt.Fprintf(&b, ", system call %s", t.Syscall)
	}
	return b.String()
}

// TimeoutError says that the tasks of a cgroup did not freeze, or thaw, in the
// time given. Err is the context's error.
type TimeoutError struct {
	Path    string
	Thawing bool // it was to thaw, not to freeze
	After   time.Duration
	Tasks   []Task // those that would not freeze, as far as they can be told
	Err     error
}

// namedTasks is how many tasks the message names; Tasks has them all.
const namedTasks = 5

func (e *TimeoutError) Error() string {
	verb := "freeze"
	if e.Thawing {
		verb = "thaw"
	}
	after := e.After.Round(time.Millisecond)
	head := fmt.Sprintf("cgroup %s did not %s within %v (%v)", e.Path, verb, after, e.Err)
	if len(e.Tasks) == 0 {
		return head
	}
	var names []string
	for _, t := range e.Tasks[:min(namedTasks, len(e.Tasks))] {
		names = append(names, t.String())
	}
	if more := len(e.Tasks) - namedTasks; more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return fmt.Sprintf("%s: in the way: %s; let what they wait for finish, or allow more time", head, strings.Join(names, "; "))
}

func (e *TimeoutError) Unwrap() error { return e.Err }

// lagging lists the threads that may be why the cgroup does not get from
// freezing to frozen. It is called while they are asked to freeze.
func (c *Cgroup) lagging() []Task {
	pids, err := c.Processes()
	if err != nil {
		return nil // the list only serves an error message
	}
	var tasks []Task
	for _, pid := range pids {
		dirs, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*", pid))
		for _, dir := range dirs {
			tid, _ := strconv.Atoi(filepath.Base(dir))
			if t, ok := readTask(pid, tid); ok && c.freezer.mayLag(t.State) {
				tasks = append(tasks, t)
			}
		}
	}
	return tasks
}

// stillAsleep sorts out, after the thaw, the tasks that had frozen: a task shown
// as D that has left this state with the thaw was frozen, one that has not
// sleeps uninterruptibly on its own account.
func stillAsleep(tasks []Task) []Task {
	pause(breather)
	return slices.DeleteFunc(tasks, func(t Task) bool {
		now, ok := readTask(t.PID, t.TID)
		return t.State == 'D' && (!ok || now.State != 'D')
	})
}

// withoutVforkParents drops the parents that wait for a vfork child. They show as
// D too, but both freezers count them as frozen (wait_for_vfork_done() in
// kernel/fork.c). If nobody else is in sight they are named all the same.
func withoutVforkParents(tasks []Task) []Task {
	rest := slices.DeleteFunc(slices.Clone(tasks), func(t Task) bool {
		nr, err := strconv.Atoi(t.Syscall)
		forks := nr == unix.SYS_VFORK || nr == unix.SYS_CLONE || nr == unix.SYS_CLONE3
		return err == nil && t.State == 'D' && forks
	})
	if len(rest) == 0 {
		return tasks
	}
	return rest
}

// readTask reads what /proc says of a thread. It reports false if it has ended.
func readTask(pid, tid int) (Task, bool) {
	dir := fmt.Sprintf("%d/task/%d", pid, tid)
	t := Task{PID: pid, TID: tid, Comm: statusField(dir, "Name")}
	state := statusField(dir, "State") // "D (disk sleep)"
	if state == "" {
		return t, false
	}
	t.State = state[0]
	if inner := strings.Fields(statusField(strconv.Itoa(pid), "NSpid")); len(inner) > 0 {
		t.NSPID, _ = strconv.Atoi(inner[len(inner)-1])
	}
	// Both are refused to readers who may not ptrace the task; wchan is "0"
	// for a task that does not sleep, syscall then says "running".
	if wchan, err := readValue("/proc/" + dir + "/wchan"); err == nil && wchan != "0" {
		t.Wchan = wchan
	}
	if call, err := readValue("/proc/" + dir + "/syscall"); err == nil && call != "running" {
		t.Syscall, _, _ = strings.Cut(call, " ")
	}
	return t, true
}

// statusField returns one field of /proc/TASK/status, or "" if there is none.
func statusField(task, key string) string {
	status, err := os.ReadFile("/proc/" + task + "/status")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
