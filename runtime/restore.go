package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	goruntime "runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/cgroupfreeze"
	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/cgroup"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/guardian"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/network"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/sysv"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// FileValidations are the values of RestoreOptions.FileValidation.
var FileValidations = file.Validations

// RestoreOptions say what to restore, from where, and as what.
type RestoreOptions struct {
	Root    string // state root of the runtime
	ID      string // of the new container
	Bundle  string
	Image   io.Reader
	PidFile string
	// ConsoleSocket is the path of a socket that takes the master of the
	// container's terminal. Without it and without Detach it is Restored.Terminal.
	ConsoleSocket string
	Detach        bool
	// FileValidation is one of FileValidations, "" for the first.
	FileValidation string
	// RootfsDiff is one of RootfsDiffs, "" for the first.
	RootfsDiff string
	// Given are descriptors of this process, by the keys of the open files that
	// the image leaves out (CheckpointOptions.External).
	Given         map[string]int
	SystemdCgroup bool
	NoPivot       bool
	NoNewKeyring  bool
	// LeaveFrozen: nothing of the container runs before somebody thaws it
	// (runc resume).
	LeaveFrozen bool
	// TCPClose: connections come back as reset.
	TCPClose bool
	// AddressMap gives new addresses to sockets that had others.
	AddressMap map[netip.Addr]netip.Addr
	// EmptyNetwork leaves the container's network namespace to the engine.
	EmptyNetwork bool
	Log          *slog.Logger
}

// restore is one journey in.
type restore struct {
	RestoreOptions
	report Report
	begin  time.Time
	guard  *guardian.Guardian
	in     *image.Reader
	head   *image.Head

	made    *made // the container, its init a stub
	cgroup  *cgroupfreeze.Cgroup
	service *tracee.Service
	maker   *file.Maker
	memory  *tmpfs.Maker // with the rights of the bundle's process
	// memories are all that fill file systems in memory, mounted all that make
	// mounts.
	memories []*tmpfs.Maker
	mounted  []*mount.Maker
	lent     map[int]*os.File // file systems that one mount namespace has made for others, by mount
	root     *rootDiff
	mounts   *mount.Maker              // nil where they are as the engine makes them
	ipc      map[image.Ref]*sysv.Maker // by namespace, 0 for the container's own
	spaces   map[image.Ref]*os.File    // ipc namespaces that tasks have made
	undone   map[uint32]bool           // semaphore undo lists that have their adjustments
	stubs    map[int]*tracee.Stub      // by pid inside the container
	threads  map[int][]*tracee.Stub
	filler   *mm.Filler
	users    users
	cgroups  *cgroup.Maker
	vforked  map[int32]*image.Task // children that come to be by vfork, with their parents
	full     uint64                // the stubs' capabilities
	hole     uint64                // free in all address spaces, for the service area
	nested   *namespace.Maker
	hinted   map[int][]forest.Step // threads whose ids must be chosen for them, by pid
	forked   map[int]int           // the order of forks
	parts    map[int][]part        // what threads enter when they are there, by pid
	keepers  []int                 // ghosts in namespaces of threads

	holds    []*sock.Hold // that keep off the packets of connections
	contents *contents
	lending  *lending
}

// Restored is a container that has been restored and runs.
type Restored struct {
	Report Report
	made   *made
}

// Restore grows a container from a stream. Until it is released, everything it
// has made dies with this process, and the guardian takes the rest away.
func Restore(ctx context.Context, o RestoreOptions) (*Restored, error) {
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	begin := time.Now()
	r := &restore{
		RestoreOptions: o, begin: begin, in: image.NewReader(o.Image), filler: mm.NewFiller(),
		stubs: map[int]*tracee.Stub{}, threads: map[int][]*tracee.Stub{}, hinted: map[int][]forest.Step{}, forked: map[int]int{},
		parts: map[int][]part{}, undone: map[uint32]bool{}, spaces: map[image.Ref]*os.File{},
	}
	defer r.close()
	err := travel(ctx, []phase{
		{"read the head", r.readHead},
		{"create the container", r.create},
		{"open files", r.openFiles},
		{"grow the forest", r.grow},
		{"rebuild tasks", r.rebuild},
		{"fill in contents", r.fill},
		{"finish tasks", r.finish},
		{"settle", r.settle},
		{"release", r.release},
	}, &r.report)
	if err != nil {
		return nil, r.abandon(err)
	}
	r.report.Wall = time.Since(begin)
	r.report.ID, r.report.Tasks = fmt.Sprintf("%x", r.head.Header.ID), len(r.head.Tasks)
	for _, t := range r.head.Tasks {
		r.report.Threads += len(t.Threads)
	}
	return &Restored{Report: r.report, made: r.made}, r.afterwards()
}

func (r *restore) close() {
	if r.maker != nil {
		r.maker.Close()
	}
	for _, m := range r.memories {
		m.Close()
	}
	if r.root != nil {
		_ = r.root.Close()
	}
	if r.contents != nil {
		r.contents.cancel()
	}
	_ = r.filler.Close()
	for _, f := range r.spaces {
		_ = f.Close()
	}
	if r.service != nil {
		_ = r.service.Close()
	}
	if r.made != nil {
		_ = unix.Close(r.made.sock)
	}
}

// readHead reads the metadata and checks all of it before anything is made.
func (r *restore) readHead(context.Context) error {
	started := make(chan error, 1)
	go func() {
		var err error
		r.guard, err = guardian.Start()
		started <- err
	}()
	var err error
	r.head, err = r.in.Head()
	if err == nil {
		err = r.checkMachine(r.head)
	}
	if e := <-started; err == nil {
		err = e
	}
	if err == nil {
		r.changeConnections()
	}
	return err
}

// checkMachine refuses an image whose registers or code this machine does not
// understand.
func (r *restore) checkMachine(head *image.Head) error {
	a := &head.Arch
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	if m := unix.ByteSliceToString(u.Machine[:]); a.Machine != m {
		return fail.Refuse("", fmt.Sprintf("the image is of a machine of type %s and this one is %s", a.Machine, m), "restore on a machine of its type")
	}
	here := machine()
	if a.PageSize != here.PageSize {
		return fail.Refuse("", fmt.Sprintf("the image has pages of %d bytes and this machine of %d", a.PageSize, here.PageSize), "")
	}
	if missing := requiredFeatures(here.Features, a.Features); len(missing) > 0 {
		return fail.Refuse("", fmt.Sprintf("this processor lacks what the image's programs may use: %v", missing), "restore on a processor that has it")
	}
	if err := fitXState(head, &here); err != nil {
		return err
	}
	for _, note := range advice(a, &here) {
		r.Log.Warn(note)
	}
	return nil
}

// create makes the container with a stub as its init.
func (r *restore) create(context.Context) (err error) {
	if r.service, err = tracee.NewService(); err != nil {
		return err
	}
	if err := file.CheckGiven(r.head, r.Given); err != nil {
		return err
	}
	if r.made, err = createContainer(r); err != nil {
		return err
	}
	if r.cgroup, err = cgroupfreeze.Open(r.made.state.CgroupPaths); err != nil {
		return err
	}
	if err := r.makeCgroups(); err != nil {
		return err
	}
	r.stubs[r.made.initPid] = r.made.stub
	r.users, r.lending, r.vforked = countUsers(r.head.Tasks), newLending(r.head), vforked(r.head.Tasks)
	mono, boot, err := nsutil.TimeOffsets(r.made.stub.Pid)
	if err != nil {
		return err
	}
	r.made.offsets = map[int32]int64{unix.CLOCK_MONOTONIC: mono, unix.CLOCK_BOOTTIME: boot}
	if r.full, err = task.Capabilities(r.made.stub.Pid); err != nil {
		return err
	}
	r.nested = &namespace.Maker{
		Head: r.head, Allowed: r.made.identity.Capabilities, Full: r.full, Offsets: r.made.offsets,
		Networks: &network.Maker{Head: r.head, Warn: r.Log.Warn},
	}
	return nil
}

// openFiles opens every file of the image in the init stub; all others inherit.
func (r *restore) openFiles(context.Context) error {
	var spaces []*image.MM
	narrow := false
	for _, t := range r.head.Tasks {
		spaces = append(spaces, r.head.MM(t.MM))
		narrow = narrow || task.Narrow(t, r.head.Sighand(t.Sighand))
	}
	var err error
	if r.hole, err = mm.Hole(narrow, spaces...); err != nil {
		return err
	}
	if err := r.made.stub.AttachService(file.ServiceFD, r.hole); err != nil {
		return err
	}
	if narrow {
		if err := r.checkNarrow(); err != nil {
			return err
		}
	}
	r.maker = file.NewMaker(r.head, r.made.stub, r.made.sock, r.made.identity)
	if r.maker.IDs, err = readIDMaps(r.made.stub.Pid); err != nil {
		return err
	}
	r.maker.Warn, r.maker.Given = r.Log.Warn, r.Given
	r.maker.Clocks = func() *task.Clocks { return r.clocksBy(r.made.offsets) }
	if r.maker.Validation = r.FileValidation; r.maker.Validation == "" {
		r.maker.Validation = file.ValidateStrict
	}
	r.maker.Keeper = func(ns image.Ref) int { return r.hostPid(int32(r.nested.Keeper(ns))) }
	if err := r.maker.Start(); err != nil {
		return err
	}
	for _, step := range []func() error{r.makeNetwork, r.restoreNames, r.prepareMounts, r.makeTmpfs, r.attachMounts, r.makeIPC, r.allowQueues, r.maker.Make} {
		if err := step(); err != nil {
			return err
		}
	}
	if err := r.nested.Networks.Attached(); err != nil {
		return err
	}
	if err := r.prepareNesting(); err != nil {
		return err
	}
	return r.fillSegments(0)
}

// fillSegments opens the shared memory that is there once the ipc namespace ns, 0
// for the container's own, has its objects, to fill it.
func (r *restore) fillSegments(ns image.Ref) error {
	for ref, o := range r.head.Objects {
		rec, ok := o.(*image.Shmem)
		if !ok || rec.SysV == nil && ns != 0 || rec.SysV != nil && rec.SysV.Perm.NS != ns {
			continue
		}
		f, err := r.segment(ref, rec)
		if err != nil {
			return err
		}
		r.filler.Segment(ref, f)
	}
	return nil
}

// checkNarrow refuses 32-bit tasks where the kernel does not run them.
func (r *restore) checkNarrow() error {
	var b tracee.Batch
	task.RunsNarrow(&b)
	_, err := r.made.stub.Run(&b)
	if errors.Is(err, tracee.ErrFault) {
		return fail.Refuse("", "the image has 32-bit tasks, which this kernel does not run (CONFIG_IA32_EMULATION, ia32_emulation=)", "restore on a host that does")
	}
	return err
}

// segment opens shared memory, to fill it.
func (r *restore) segment(ref image.Ref, rec *image.Shmem) (mm.Writer, error) {
	if rec.SysV != nil {
		f, err := r.ipc[rec.SysV.Perm.NS].Memory(r.made.stub.Pid, rec)
		if err != nil || rec.HugePage == 0 {
			return f, err
		}
		fd, err := r.maker.Keep(r.made.stub, f)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return mm.SegmentWriter(rec, r.made.stub, fd, f)
	}
	return r.maker.Segment(ref, rec)
}

// grow makes every process, in the order forest plans.
func (r *restore) grow(ctx context.Context) error {
	r.contents = readContents(r.in)
	all, reserved := r.hierarchy()
	brought := guests(&r.head.Tree)
	if len(brought) > 0 {
		pid, err := r.bringHelper(idsOf(all, reserved))
		if err != nil {
			return err
		}
		reserved = append(reserved, pid)
	}
	growth, err := plan(&r.head.Tree, all, reserved)
	if err != nil {
		return err
	}
	steps := growth.Steps
	r.keepers = growth.Keepers
	var b tracee.Batch
	task.ResetSignals(&b)
	task.ChildSignals(&b, true)
	r.maker.TakeTerminal(&b, r.made.initPid)
	if _, err := r.made.stub.Run(&b); err != nil {
		return err
	}
	for i, s := range steps {
		if s.Op == forest.Fork {
			r.forked[s.Child] = 1 + i // the init, which nobody forks, comes before all
		}
	}
	for len(steps) > 0 {
		if steps[0].Nested != nil {
			if err := r.nestedStep(ctx, steps[0]); err != nil {
				return fail.In(fmt.Sprintf("task %d", steps[0].Pid), err)
			}
			steps = steps[1:]
			continue
		}
		n := 1
		for n < len(steps) && n < 1000 && steps[n].Pid == steps[0].Pid && steps[n-1].Op != forest.Exit && steps[n].Nested == nil {
			n++
		}
		if err := r.steps(ctx, steps[:n]); err != nil {
			return err
		}
		steps = steps[n:]
	}
	if err := r.placeTasks(); err != nil {
		return err
	}
	if err := r.makeNestedIPC(); err != nil {
		return err
	}
	if err := r.makeNestedMounts(); err != nil {
		return err
	}
	if err := r.maker.OpenInside(r.stubs); err != nil {
		return err
	}
	if err := r.nested.Networks.Finish(); err != nil {
		return err
	}
	if err := r.maker.Obtain(r.hostPid); err != nil {
		return err
	}
	for _, pid := range brought {
		r.made.guests = append(r.made.guests, r.stubs[pid].Pid)
	}
	if h := r.stubs[helper]; h != nil {
		delete(r.stubs, helper)
		return h.Exit(0)
	}
	if err := r.maker.ConnectSockets(r.stubs); err != nil {
		return err
	}
	return r.maker.SettleTerminals(r.stubs)
}

// hostPid is the pid here of a task that is there, else 0.
func (r *restore) hostPid(pid int32) int {
	if s := r.stubs[int(pid)]; s != nil {
		return s.Pid
	}
	return 0
}

func (r *restore) hierarchy() ([]forest.Process, []int) {
	processes, reserved := hierarchy(&r.head.Tree, func(p *forest.Process) {
		t := r.head.Task(int32(p.Pid))
		p.Subreaper = t.Subreaper
		p.Shared = forest.Shared{forest.MM: int(t.MM), forest.Sighand: int(t.Sighand), forest.Files: int(t.Files), forest.FS: int(t.FS), forest.SemUndo: int(t.Threads[0].SemUndo)}
	})
	return slices.DeleteFunc(processes, func(p forest.Process) bool { return r.vforked[int32(p.Pid)] != nil }), reserved
}

// steps makes a run of steps of one process as one batch.
func (r *restore) steps(ctx context.Context, steps []forest.Step) error {
	s := r.stubs[steps[0].Pid]
	if s == nil {
		return fmt.Errorf("step %q of a process that is not there", steps[0])
	}
	if steps[0].Op == forest.Exit {
		delete(r.stubs, steps[0].Pid)
		return s.Exit(0)
	}
	if slices.ContainsFunc(steps, func(s forest.Step) bool { return s.Op == forest.Fork }) {
		if err := r.beforeFork(ctx, steps[0].Pid); err != nil {
			return err
		}
	}
	var b tracee.Batch
	var children []int
	for _, step := range steps {
		switch step.Op {
		case forest.Fork:
			children = append(children, step.Child)
			r.slackForChild(&b, step.Child)
			task.CloneProcess(&b, []int32{int32(step.Child)}, r.exitSignal(step.Child), cloneFlags(step.Tables))
		case forest.Leave:
			b.Add(unix.SYS_UNSHARE, tracee.W(cloneFlags(step.Tables)))
		case forest.Enter:
			children = append(children, step.Child)
			r.slackForChild(&b, step.Child)
			task.CloneSibling(&b, int32(step.Child))
		case forest.Setsid:
			b.Add(unix.SYS_SETSID)
			r.maker.TakeTerminal(&b, step.Pid)
		case forest.Setpgid:
			b.Add(unix.SYS_SETPGID, tracee.W(0), tracee.W(step.Pgid))
		case forest.Subreaper:
			on := 0
			if step.On {
				on = 1
			}
			b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_CHILD_SUBREAPER), tracee.W(on))
		case forest.Exit: // the last of the run
			if err := r.runSteps(s, &b, steps[0].Pid, children); err != nil {
				return err
			}
			return r.steps(ctx, []forest.Step{step})
		}
	}
	return r.runSteps(s, &b, steps[0].Pid, children)
}

func (r *restore) slackForChild(b *tracee.Batch, pid int) {
	if t := r.head.Task(int32(pid)); t != nil {
		task.SlackForChild(b, &t.Threads[0].Controls)
	}
}

func (r *restore) runSteps(s *tracee.Stub, b *tracee.Batch, pid int, children []int) error {
	cloned, err := s.Run(b)
	if err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("%w (a pid of the image is taken: is something else in the container's pid namespace?)", err)
		}
		return err
	}
	if len(cloned) != len(children) {
		return fmt.Errorf("task %d made %d children instead of %d", s.Pid, len(cloned), len(children))
	}
	for i, host := range cloned {
		if r.stubs[children[i]], err = s.NewChild(host, host); err != nil {
			return err
		}
		r.lending.forked(pid, children[i])
	}
	return nil
}

func (r *restore) exitSignal(pid int) int32 {
	if t := r.head.Task(int32(pid)); t != nil && t.ExitSignal >= 0 {
		return t.ExitSignal
	}
	return int32(unix.SIGCHLD)
}

// each calls f for every live task, with its stub.
func (r *restore) each(ctx context.Context, f func(t *image.Task, s *tracee.Stub) error) error {
	for _, t := range r.head.Tasks {
		if r.vforked[t.Pid] != nil {
			continue // it comes to be when its parent is finished
		}
		err := ctx.Err()
		if err == nil {
			err = fault.Point("restore.task")
		}
		if err == nil {
			err = f(t, r.stubs[int(t.Pid)])
		}
		if err != nil {
			return fail.In(fmt.Sprintf("task %d (%s)", t.Pid, strconv.QuoteToGraphic(string(t.Threads[0].Comm))), err)
		}
	}
	return nil
}

// rebuild gives every task its address space, still empty, and its descriptors.
func (r *restore) rebuild(ctx context.Context) error {
	err := r.each(ctx, func(t *image.Task, s *tracee.Stub) error {
		if err := r.rebuildSpace(t.MM); err != nil {
			return err
		}
		if r.users.first(t.Files, "rebuild") {
			if err := r.maker.Table(s, r.head.Files(t.Files)); err != nil {
				return err
			}
		}
		return r.logIn(t, s)
	})
	if err != nil {
		return err
	}
	err = r.each(ctx, func(t *image.Task, s *tracee.Stub) error {
		if files := r.head.Files(t.Files); r.users.first(t.Files, "about") && !r.maker.AboutThreads(files) {
			return r.maker.OpenAbout(s, files)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return r.maker.RegisterLate()
}

// logIn gives a stub the login uid of its task, where it may have another than
// that of the restore: who restores answers for what he does, and nothing in an
// image may name somebody else (audit(8)).
func (r *restore) logIn(t *image.Task, s *tracee.Stub) error {
	now, err := task.LoginUID(s.Pid)
	if err != nil || now == t.LoginUID {
		return err
	}
	if err = r.made.mayLogIn; err == nil {
		err = task.RestoreLoginUID(s, t.LoginUID)
	}
	if err != nil {
		r.Log.Warn("login uid not restored", "pid", t.Pid, "uid", t.LoginUID, "instead", now, "error", err)
	}
	return nil
}

// fill puts the contents in as they come, those that growing has not taken.
// Reading and checking the stream goes on while the pages before are copied.
func (r *restore) fill(ctx context.Context) error {
	for {
		c, err := r.contents.peek(ctx)
		if errors.Is(err, io.EOF) {
			return r.atEnd()
		}
		if err == nil {
			err = r.put(c)
		}
		if err != nil {
			return err
		}
		r.contents.take()
		c.Release()
	}
}

// atEnd refuses a file that goes on after its image. A stream may have other
// uses for what follows, and would make us wait for it.
func (r *restore) atEnd() error {
	f, ok := r.Image.(*os.File)
	if !ok {
		return nil
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return err
	}
	return r.in.AtEnd()
}

func (r *restore) put(c *image.Content) error {
	if err := fault.Point("restore.chunk"); err != nil {
		return err
	}
	if q, ok := r.head.Objects[c.Ref].(*image.Messages); ok {
		r.ipc[q.Perm.NS].Fill(c.Ref, c.Raw)
		return nil
	}
	for _, m := range r.memories {
		if m.Has(c.Ref) {
			return m.Fill(c.Ref, c.Offset, c.Raw)
		}
	}
	if c.Type == image.TypeBytes {
		return r.maker.Fill(c.Ref, c.Offset, c.Raw)
	}
	return r.filler.Fill(c)
}

// finish gives every task what must wait for its memory: threads, credentials,
// signals, timers, and at the very end the registers to be released with.
func (r *restore) finish(ctx context.Context) error {
	if err := r.filler.Close(); err != nil {
		return err
	}
	if n := r.filler.Copied; n > 0 {
		r.Log.Warn("memory that processes shared by fork could not be shared again", "bytes", n)
	}
	if err := r.maker.SettleSockets(); err != nil {
		return err
	}
	if err := r.endKeepers(); err != nil {
		return err
	}
	if err := r.endZombies(); err != nil {
		return err
	}
	if err := r.maker.Seal(); err != nil {
		return err
	}
	for _, m := range r.memories {
		if err := m.Finish(); err != nil {
			return err
		}
	}
	if err := r.finishIPC(); err != nil {
		return err
	}
	for _, m := range r.mounted {
		if err := m.Finish(); err != nil {
			return err
		}
	}
	if err := r.stopJobs(); err != nil {
		return err
	}
	if err := r.maker.Watch(); err != nil {
		return err
	}
	r.finishWritersLast()
	return r.each(ctx, r.finishTask)
}

// stopJobs stops those that job control had stopped, as long as all are stubs.
func (r *restore) stopJobs() error {
	depth := map[int32]int{} // in pid namespaces below the container's
	for i := range r.head.Tree.Processes {
		p := &r.head.Tree.Processes[i]
		if p.Inner != nil {
			depth[p.Pid] = len(p.Inner.Pgid)
		}
		t := r.head.Task(p.Pid)
		if t == nil || r.vforked[p.Pid] != nil {
			continue
		}
		pid := p.Pid
		if d := depth[p.Ppid]; d > 0 && d <= depth[p.Pid] {
			pid = p.Inner.Threads[0][d-1]
		}
		exact, err := task.RestoreJob(r.stubs[int(p.Pid)], r.stubs[int(p.Ppid)], pid, t)
		if err != nil {
			return fail.In(fmt.Sprintf("task %d", t.Pid), fmt.Errorf("stop it by signal %d: %w", t.Stopped, err))
		}
		if !exact {
			r.Log.Warn("stopped by another signal than it was, its process group being orphaned", "task", t.Pid, "was", t.Stopped, "is", int(unix.SIGSTOP))
		}
	}
	return nil
}

func (r *restore) finishTask(t *image.Task, s *tracee.Stub) error {
	actions := r.head.Sighand(t.Sighand)
	var b tracee.Batch
	space := r.head.MM(t.MM)
	if r.users.first(t.MM, "finish") {
		if err := mm.Layout(&b, space, r.maker); err != nil {
			return err
		}
		if err := mm.RestoreRings(s, space); err != nil {
			return err
		}
		if err := r.filler.Protect(s, &b, t.MM, space); err != nil {
			return err
		}
	}
	task.RestoreProcess(&b, t, actions)
	if r.vforked[t.Pid] != nil {
		if err := r.enterCgroups(int(t.Pid), s.Pid); err != nil {
			return err
		}
	}
	threads, err := r.cloneThreads(t, s, &b)
	if err == nil {
		err = r.placeThreads(t, threads)
	}
	if err == nil {
		err = mm.CheckLocked(s.Pid, space)
	}
	if err != nil {
		return task.Explain(file.ExplainLock(err))
	}
	if err := task.RestoreLDT(s, t.LDT); err != nil {
		return err
	}
	if err := task.RestoreCoredumpFilter(s.Pid, t.CoredumpFilter); err != nil {
		return fmt.Errorf("coredump filter: %w", err)
	}
	r.threads[int(t.Pid)] = threads
	var helper *hand
	if vforks(t) {
		if helper, err = r.newHand(s); err != nil {
			return err
		}
	}
	f := &finishing{task: r.asItself(t), pid: t.Pid, sighand: actions, held: task.Held{Capabilities: r.full, Filters: r.made.filters}}
	if parent := r.vforked[t.Pid]; parent != nil {
		f.held = heldByVforked(parent, t)
	}
	if r.nested.User(int(t.Pid)) != 0 {
		f.held.IDs = true
		if f.held.Capabilities, err = task.Capabilities(s.Pid); err != nil {
			return err
		}
	}
	if t.Threads[0].Exited {
		f.last = 1
	}
	for i := len(threads) - 1; i >= 0; i-- { // the leader last
		err := r.prepareThread(f, i, threads[i])
		if err == nil && i > f.last {
			err = r.finishThread(f, i, threads[i])
		}
		if err != nil {
			return fail.On(fmt.Sprintf("thread %d", t.Threads[i].Tid), err)
		}
	}
	if t.Threads[0].Exited {
		if err := threads[0].ExitThread(t.Threads[0].ExitCode>>8, t.Stopped == 0); err != nil {
			return fail.On(fmt.Sprintf("thread %d", t.Threads[0].Tid), err)
		}
		r.threads[int(t.Pid)] = threads[1:]
	}
	if err := r.finishThread(f, f.last, threads[f.last]); err != nil {
		return fail.On(fmt.Sprintf("thread %d", t.Threads[f.last].Tid), err)
	}
	if !task.KeepsDumpable(t) {
		r.Log.Warn("not dumpable at all instead of by root only, as fs.suid_dumpable is not 2 here", "pid", t.Pid)
	}
	if err := task.RestoreOOMScore(s.Pid, t.OOMScoreAdj); err != nil {
		r.Log.Warn("oom_score_adj not restored", "pid", t.Pid, "value", t.OOMScoreAdj, "error", err)
	}
	if helper != nil {
		return r.vfork(t, threads, helper)
	}
	return nil
}

// finishing is what the threads of a process have in common at their end.
type finishing struct {
	task    *image.Task // with the ids that it has in its own pid namespace
	pid     int32       // in the container's
	sighand *image.Sighand
	held    task.Held
	last    int // the thread that is finished last: the leader, unless it has ended
}

// prepareThread gives a thread what its stub has to call for.
func (r *restore) prepareThread(f *finishing, i int, s *tracee.Stub) error {
	t, rec := f.task, &f.task.Threads[i]
	if rec.PDeathSig != 0 && (s.Pid == r.made.stub.Pid || slices.Contains(r.made.guests, s.Pid)) {
		// Its parent would be us. The real one is gone anyway.
		r.Log.Warn("parent death signal of a process whose parent is outside the container is dropped", "task", t.Pid, "signal", rec.PDeathSig)
		rec.PDeathSig = 0
	}
	clocks := r.clocks(f.pid)
	var b tracee.Batch
	if rec.SemUndo != 0 && !r.undone[rec.SemUndo] {
		for _, ref := range slices.Sorted(keys(r.ipc)) {
			r.ipc[ref].Undo(&b, rec.SemUndo)
		}
		r.undone[rec.SemUndo] = true
	}
	task.RestoreThread(&b, rec, f.held)
	if i == 0 && len(t.Timers) > 0 {
		if _, err := s.Run(&b); err != nil {
			return task.Explain(err)
		}
		b.Reset()
		if err := task.RestoreTimers(s, t, clocks); err != nil {
			return fmt.Errorf("timers: %w", err)
		}
	}
	if i == 0 {
		task.RestoreLast(&b, t, clocks)
	}
	table := rec.Files
	if i == 0 {
		table = t.Files
	}
	r.maker.Own(&b, r.head.Files(table), t.Pid)
	r.maker.Notify(&b, r.head.Files(table), f.pid)
	task.RestoreThreadLast(&b, t, i)
	_, err := s.Run(&b)
	return task.Explain(err)
}

// finishThread puts a thread where it goes on. The last one of its process takes
// the stub away.
func (r *restore) finishThread(f *finishing, i int, s *tracee.Stub) error {
	rec := &f.task.Threads[i]
	if rec.Vfork != 0 {
		return nil // the rest comes when it has vforked
	}
	regs, err := tracee.DecodeRegs(rec.Regs)
	if err != nil {
		return err
	}
	if regs, err = task.RestoreRestart(s, rec.Restart, regs, r.clocks(f.pid)); err != nil {
		return err
	}
	if i == f.last && !vforks(f.task) && r.users.done(f.task.Sighand) {
		if err := task.RestoreTrap(s, f.sighand); err != nil {
			return err
		}
	}
	if err := task.QueueTraps(s, f.task, i, i == f.last); err != nil {
		return err
	}
	if i == f.last && !vforks(f.task) && r.users.done(f.task.MM) {
		if err := task.UnmapService(s); err != nil {
			return err
		}
	}
	return task.RestoreRegisters(s, rec, regs)
}

// clocks reads how far the container's clocks have gone since the checkpoint. If
// they do not go on from there, there being no time namespace, nothing counts as
// passed.
func (r *restore) clocks(pid int32) *task.Clocks { return r.clocksBy(r.nested.ClocksOf(pid)) }

// clocksBy does so for clocks at some offsets from the host's.
func (r *restore) clocksBy(offsets map[int32]int64) *task.Clocks {
	host := func(id int32) int64 {
		var ts unix.Timespec
		_ = unix.ClockGettime(id, &ts) // a timer has been made on it
		return ts.Nano()
	}
	passed := host(unix.CLOCK_MONOTONIC) + r.made.offsets[unix.CLOCK_MONOTONIC] - r.head.Container.Monotonic
	if passed < 0 || passed > int64(time.Since(r.begin)) {
		passed = 0
	}
	return &task.Clocks{Now: func(id int32) int64 { return host(id) + offsets[id] }, Passed: passed}
}

// endZombies lets those exit whose parents have not reaped them yet. From then
// on children are no longer reaped by themselves.
func (r *restore) endZombies() error {
	for i := range r.head.Tree.Processes {
		p := &r.head.Tree.Processes[i]
		if !p.Zombie {
			continue
		}
		var parent, own tracee.Batch
		task.ChildSignals(&parent, false)
		reaper := r.stubs[int(p.Ppid)]
		if reaper == nil {
			return fmt.Errorf("zombie %d has no parent that lives", p.Pid)
		}
		if _, err := reaper.Run(&parent); err != nil {
			return err
		}
		own.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_NAME), own.String(string(p.Comm)))
		z := r.stubs[int(p.Pid)]
		if _, err := z.Run(&own); err != nil {
			return err
		}
		delete(r.stubs, int(p.Pid))
		if err := z.Exit(unix.WaitStatus(p.Status)); err != nil {
			return fail.In(fmt.Sprintf("task %d (zombie)", p.Pid), err)
		}
	}
	return nil
}

// settle makes the container an ordinary one for its runtime: the state file
// gets the true configuration, the cgroup its limits. What was changed in the root
// file system is not put back from here on, for nobody is to see what that takes.
func (r *restore) settle(context.Context) error {
	if err := r.made.lib.Set(r.made.config); err != nil {
		return fmt.Errorf("resource limits: %w", err)
	}
	if err := r.cgroups.Finish(); err != nil {
		return err
	}
	if r.PidFile != "" {
		if _, err := r.guard.Promise(guardian.Remove(r.PidFile)); err != nil {
			return err
		}
		if err := writePidFile(r.PidFile, r.made.stub.Pid); err != nil {
			return err
		}
	}
	return fail.On("root file system", r.root.keep())
}

// release lets everything go in one act: detached while the cgroup is frozen,
// all tasks begin with the thaw. The thaw is the commit, and where it is left to
// the engine, the end of the guardian.
//
// Processes that job control has stopped go first: they stay where they are, and
// nobody is to see them on their way.
func (r *restore) release(ctx context.Context) error {
	var back []int
	for _, t := range r.head.Tasks {
		if t.Stopped == 0 {
			continue
		}
		if err := r.detach(int(t.Pid)); err != nil {
			return err
		}
		for _, s := range r.threads[int(t.Pid)] {
			back = append(back, s.Tid)
		}
		delete(r.threads, int(t.Pid))
	}
	task.AwaitJobStops(back)
	if err := r.cgroup.Freeze(ctx); err != nil {
		return err
	}
	if err := fault.Point("restore.detach"); err != nil {
		return err
	}
	for _, t := range r.head.Tasks {
		if err := task.SendStops(r.threads[int(t.Pid)], t); err != nil {
			return fail.In(fmt.Sprintf("task %d", t.Pid), err)
		}
	}
	for _, pid := range slices.Sorted(keys(r.threads)) {
		if err := r.detach(pid); err != nil {
			return err
		}
	}
	if err := r.revive(); err != nil {
		return err
	}
	if err := fault.Point("restore.thaw"); err != nil || r.LeaveFrozen {
		return err
	}
	return r.cgroup.Thaw(ctx)
}

func (r *restore) detach(pid int) error {
	for _, s := range r.threads[pid] {
		if err := s.Detach(0); err != nil {
			return err
		}
	}
	return nil
}

func keys[K comparable, V any](m map[K]V) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// afterwards runs what comes after the start of a container.
func (r *restore) afterwards() error {
	err := r.guard.Dismiss()
	return errors.Join(err, r.made.poststart())
}

// abandon takes away everything that was made.
func (r *restore) abandon(err error) error {
	if r.made != nil {
		err = join(err, r.made.destroy())
	}
	if r.guard != nil {
		err = join(err, r.guard.Rollback())
		err = join(err, r.guard.Dismiss())
	}
	return err
}

// writePidFile writes a pid the way runc does: beside, then renamed.
func writePidFile(path string, pid int) error {
	beside := path + ".ocickpt"
	if err := os.WriteFile(beside, []byte(strconv.Itoa(pid)), 0o644); err != nil {
		return fmt.Errorf("pid file: %w", err)
	}
	return os.Rename(beside, path)
}
