package runtime

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/sysv"
)

// scanQueues reads the POSIX message queues of the container.
func (n *census) scanQueues(c *container) error {
	if !c.owns("ipc") {
		return nil
	}
	var dir *os.File
	err := nsutil.Inside(nsutil.Path(c.initPid, "ipc"), func() (err error) {
		dir, err = namespace.OpenQueues()
		return err
	})
	if err != nil {
		return err
	}
	defer dir.Close()
	return n.files.AddQueues(dir, func() image.Ref { return 0 })
}

// scanIPC reads the System V objects of the container.
func (n *census) scanIPC(c *container) error {
	if !c.owns("ipc") {
		n.ipc = &sysv.Set{}
		return nil
	}
	err := nsutil.Inside(nsutil.Path(c.initPid, "ipc"), func() (err error) {
		n.ipc, err = sysv.Scan(c.maps)
		return err
	})
	if err != nil {
		return err
	}
	for _, rec := range n.ipc.Segments {
		n.shared.SysV(rec)
	}
	return nil
}

// openUnattached opens the segments that no task has attached, of which the
// memory cannot be had through one.
func (n *census) openUnattached(c *container) error {
	for _, seg := range n.shared.Segments() {
		if !seg.Unattached() {
			continue
		}
		id := seg.Record.SysV.Perm.ID
		err := nsutil.Inside(nsutil.Path(c.initPid, "ipc"), func() error {
			f, huge, err := sysv.OpenUnattached(id)
			if err == nil {
				seg.Record.HugePage = huge
				n.open = append(n.open, f)
				seg.Through(f)
			}
			return err
		})
		if err != nil {
			return fail.On(fmt.Sprintf("System V shm %d", id), err)
		}
	}
	return nil
}

// noteUndo completes the records of semaphores with what tasks have to take back.
func (n *census) noteUndo(l *learned) error {
	if len(n.ipc.Sets) == 0 {
		return nil
	}
	var adjustments map[int]map[int32]map[int]int16
	asked, seen := false, map[uint32]bool{}
	for _, p := range n.procs {
		for _, tid := range p.tids {
			list := n.undoList(p, tid)
			if list == 0 || seen[list] {
				continue
			}
			seen[list] = true
			if !asked {
				adjustments, asked = ask(l, &l.undos, (*bpf.Question).SemUndos), true
			}
			if adjustments == nil {
				return fail.In(p.name(), fail.Refuse("System V sem", "what it has to take back (SEM_UNDO) only BPF can tell, which cannot be used here", "give ocickpt CAP_BPF and CAP_PERFMON, or remove the semaphores (ipcrm)"))
			}
			for _, set := range n.ipc.Sets {
				if err := noteAdjustments(set, list, adjustments[tid][set.Perm.ID]); err != nil {
					return fail.In(p.name(), err)
				}
			}
		}
	}
	return nil
}

func noteAdjustments(set *image.SemSet, list uint32, all map[int]int16) error {
	if len(set.Values) > bpf.MaxSemUndo {
		return fail.Refuse(fmt.Sprintf("System V sem %d", set.Perm.ID), fmt.Sprintf("it has %d semaphores; of sets with more than %d it cannot be told what tasks have to take back (SEM_UNDO)", len(set.Values), bpf.MaxSemUndo), "use smaller sets")
	}
	for number, by := range all {
		if number < len(set.Values) {
			set.Undo = append(set.Undo, image.SemUndo{List: list, Number: uint16(number), Adjust: by})
		}
	}
	slices.SortFunc(set.Undo, func(a, b image.SemUndo) int {
		return cmp.Or(cmp.Compare(a.List, b.List), cmp.Compare(a.Number, b.Number))
	})
	return nil
}

// makeIPC makes the System V objects of the image, in a namespace that must be
// the new container's own.
func (r *restore) makeIPC() error {
	r.ipc = sysv.NewMaker(r.head, r.maker, file.Refs(r.head))
	if !r.ipc.Needed() {
		return nil
	}
	if !r.made.owns(configs.NEWIPC) {
		return fail.Refuse("System V ipc", "the bundle gives the container no ipc namespace of its own", "restore with the bundle of the checkpoint")
	}
	ns := nsutil.Path(r.made.stub.Pid, "ipc")
	err := nsutil.Inside(ns, func() (err error) {
		r.ipc.MaxBytes, err = sysv.LongestQueue()
		return err
	})
	if err != nil {
		return err
	}
	if r.made.grants.capabilities&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		r.ipc.MaxBytes = math.MaxUint64
	}
	r.ipc.Choose = func(kind string, id int32) error {
		return nsutil.Inside(ns, func() error { return sysv.ChooseHere(kind, id) })
	}
	return r.ipc.Make()
}

// allowQueues lets the stub make as large POSIX message queues as a task of the
// container may.
func (r *restore) allowQueues() error {
	if !slices.ContainsFunc(file.Refs(r.head), func(ref image.Ref) bool { return r.head.Mqueue(ref) != nil }) {
		return nil
	}
	if !r.made.owns(configs.NEWIPC) {
		return fail.Refuse("POSIX message queues", "the bundle gives the container no ipc namespace of its own", "restore with the bundle of the checkpoint")
	}
	hard, err := r.made.grants.hardLimit(unix.RLIMIT_MSGQUEUE)
	if err != nil {
		return err
	}
	if err := unix.Prlimit(r.made.stub.Pid, unix.RLIMIT_MSGQUEUE, &unix.Rlimit{Cur: hard, Max: hard}, nil); err != nil {
		return fmt.Errorf("limit of message queues: %w", err)
	}
	return nil
}

// owns reports a namespace that is the new container's alone.
func (m *made) owns(kind configs.NamespaceType) bool {
	return m.config.Namespaces.Contains(kind) && m.config.Namespaces.PathOf(kind) == ""
}

// ipcSysctls are the limits of an ipc namespace (proc_sys_kernel(5), mq_overview(7)).
var ipcSysctls = []string{
	"kernel.shmmax", "kernel.shmall", "kernel.shmmni", "kernel.shm_rmid_forced", "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
	"fs.mqueue.queues_max", "fs.mqueue.msg_max", "fs.mqueue.msgsize_max", "fs.mqueue.msg_default", "fs.mqueue.msgsize_default",
}

// readIPCLimits warns of limits of the container's ipc namespace that are not those
// it was started with: they are the bundle's to set.
func (c *container) readIPCLimits(_ *libcontainer.State, config *configs.Config) error {
	if !c.owns("ipc") || !c.maySetSysctls() {
		return nil
	}
	var live, given map[string]string
	err := nsutil.Inside(nsutil.Path(c.initPid, "ipc"), func() (err error) {
		live, err = readSysctls(ipcSysctls)
		return err
	})
	if err == nil { // what a new one has
		err = nsutil.Inside("", func() error {
			err := unix.Unshare(unix.CLONE_NEWIPC)
			if err == nil {
				given, err = readSysctls(ipcSysctls)
			}
			return err
		})
	}
	if err != nil {
		return goneIs(c.initPid, err)
	}
	for _, name := range ipcSysctls {
		want := given[name]
		if set, ok := config.Sysctl[name]; ok {
			want = strings.Join(strings.Fields(set), " ")
		}
		if live[name] != want {
			c.warn("the container has set %s to %s; a restored one has %s, as the bundle says: set it there (linux.sysctl)", name, live[name], want)
		}
	}
	return nil
}

// readSysctls reads sysctls as the calling thread sees them; blanks are single. One
// that the kernel does not have is left out.
func readSysctls(names []string) (map[string]string, error) {
	out := map[string]string{}
	for _, name := range names {
		b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		if err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		if err == nil {
			out[name] = strings.Join(strings.Fields(string(b)), " ")
		}
	}
	return out, nil
}
