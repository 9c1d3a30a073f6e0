// Package runtime holds the two journeys of a container: out of the machine
// into a stream (checkpoint.go), and from a stream into a machine (restore.go).
// Each reads as the list of its phases.
package runtime

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	goruntime "runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/guardian"
	"github.com/ocickpt/ocickpt/runtime/halt"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Version is what images and the command line say about this program.
const Version = "ocickpt 0.1.0"

// CheckpointOptions say what to checkpoint, where to, and what then.
type CheckpointOptions struct {
	Root         string // state root of the runtime, "/run/runc"
	ID           string
	Path         string    // of the image file, or "" for Stream
	Stream       io.Writer // where the image goes if Path is ""
	LeaveRunning bool
	// RefuseExec: a process that was brought in by runc exec fails the
	// checkpoint instead of being saved.
	RefuseExec bool
	// RootfsDiff: what the container has changed in its root file system goes
	// into the image. RootfsManifest tells what was there before, where the root is
	// no overlay.
	RootfsDiff     bool
	RootfsManifest string
	// TCPEstablished: connections of TCP are kept; else they are refused.
	TCPEstablished bool
	// SkipInFlight: those that no program has accepted yet are left out.
	SkipInFlight bool
	// ExtUnixSK is what becomes of unix sockets with peers outside the container:
	// one of ExtUnixSKs, or "" to refuse them.
	ExtUnixSK string
	// External are the keys of open files that are left out, to be given anew at
	// the restore: fd[PID:N], pipe[INODE], socket[INODE], file[DEVICE:INODE],
	// tty[DEVICE:INODE].
	External []string
	// EmptyNetwork leaves what is in the container's network namespace out: the
	// engine's hooks make it again.
	EmptyNetwork bool
	Log          *slog.Logger
}

// ExtUnixSKs are the values of CheckpointOptions.ExtUnixSK besides none.
var ExtUnixSKs = sock.Outsides

// Report says how a journey went.
type Report struct {
	ID      string        // of the image, hexadecimal
	Bytes   uint64        // of the image
	Stopped time.Duration // from the freeze to the release or the kill
	Wall    time.Duration
	Phases  []PhaseTime
	Tasks   int
	Threads int
}

// PhaseTime is how long one phase took.
type PhaseTime struct {
	Name string
	Took time.Duration
}

// checkpoint is one journey out.
type checkpoint struct {
	CheckpointOptions
	report  Report
	c       *container
	guard   *guardian.Guardian
	lock    *os.File // the container's state directory
	out     *output
	head    headRecords
	stopped time.Time
	thaw    guardian.Entry
	quota   []lifted
	learned *learned
	confine landlock

	sealed bool // the guardian's way is forward only
	// arrivals keeps new connections off, nil where nothing does.
	arrivals *sock.Hold
	halt     *halt.Halt
	waiting  map[int]bpf.VforkParent // threads that wait in vfork, by host tid
	census   *census
	tree     image.Tree
	w        *image.Writer
	wrote    bool
}

// headRecords are the records that are the same for every container.
type headRecords struct {
	header image.Header
	arch   image.Arch
}

// phase is one leg of a journey.
type phase struct {
	name string
	run  func(context.Context) error
}

// travel runs the phases in order until one fails or ctx ends.
func travel(ctx context.Context, phases []phase, report *Report) error {
	for _, p := range phases {
		begin := time.Now()
		err := ctx.Err()
		if err == nil {
			err = fault.Point(p.name)
		}
		if err == nil {
			err = p.run(ctx)
		}
		if err != nil {
			return fail.During(p.name, err)
		}
		report.Phases = append(report.Phases, PhaseTime{p.name, time.Since(begin)})
	}
	return nil
}

// Checkpoint saves a container. Whatever goes wrong before the release puts it
// back as it was; the error says in one line what, where and what to do.
func Checkpoint(ctx context.Context, o CheckpointOptions) (*Report, error) {
	// A tracer is a thread, not a process (ptrace(2)).
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	begin := time.Now()
	k := &checkpoint{CheckpointOptions: o}
	defer k.close()
	phases := []phase{
		{"prepare", k.prepare},
		{"survey", k.survey},
		{"stop", k.stop},
		{"collect", k.collect},
		{"read connections", k.readConnections},
		{"write the head", k.writeHead},
		{"write the contents", k.writeContents},
		{"check for newcomers", k.checkNewcomers},
	}
	finish, release := []phase{{"finish the image", k.finishImage}, {"commit", k.commit}}, []phase{{"release", k.release}}
	if k.LeaveRunning { // what is yet to be written is held as it was
		phases = slices.Concat(phases, release, finish)
	} else {
		phases = slices.Concat(phases, finish, release)
	}
	if err := travel(ctx, phases, &k.report); err != nil {
		return nil, k.putBack(err)
	}
	if err := k.settleAfter(ctx); err != nil {
		return nil, fail.During("finish", err)
	}
	k.report.Wall = time.Since(begin)
	return &k.report, nil
}

func (k *checkpoint) close() {
	if k.halt != nil {
		k.halt.Forget()
	}
	if k.out != nil {
		_ = k.out.Close()
	}
	if k.census != nil {
		k.census.Close()
	}
	k.confine.close()
	if k.learned != nil {
		k.learned.close()
	}
	if k.c != nil {
		_ = k.c.Close()
	}
	if k.lock != nil {
		_ = k.lock.Close()
	}
}

// prepare does everything that can be done while the container runs.
func (k *checkpoint) prepare(context.Context) error {
	lock, err := lockState(k.Root, k.ID)
	if err != nil {
		return err
	}
	k.lock = lock
	started := make(chan error, 1)
	go func() {
		var err error
		k.guard, err = guardian.Start(lock)
		started <- err
	}()
	c, err := load(k.Root, k.ID)
	k.c = c
	if err == nil {
		k.confine.expect(c)
		if k.RootfsDiff || k.RootfsManifest != "" {
			err = c.openRootDiff(k.RootfsManifest)
		}
	}
	if err == nil {
		c.refuseGuests, c.emptyNetwork = k.RefuseExec, k.EmptyNetwork
		c.sockets = sock.Choices{Established: k.TCPEstablished, SkipInFlight: k.SkipInFlight, Outside: k.ExtUnixSK, Warn: c.warn}
		c.promise, c.promisePosition = k.promiseOption, k.promisePosition
		err = c.leaveOut(k.External)
	}
	if err == nil {
		err = c.readLinks()
	}
	if err == nil {
		k.learned = newLearned(k.Log)
		c.sockets.Alike = k.learned.alikeSockets
		err = k.expect()
	}
	if err == nil {
		err = k.head.fill(image.Options{LeaveRunning: k.LeaveRunning, TCPEstablished: k.TCPEstablished, SkipInFlight: k.SkipInFlight})
	}
	if e := <-started; err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if k.halt, err = halt.New(c.cgroupPaths, c.record.Paused); err != nil {
		return err
	}
	k.halt.TakesWaiting = sync.OnceValue(func() bool {
		_, err := bpf.VforkParents(nil)
		return err == nil
	})
	if k.out, err = openOutput(k.Path, k.Stream, k.guard); err != nil {
		return err
	}
	k.w = image.NewWriter(k.out)
	return nil
}

// promiseOption has the guardian give an option of a socket a value if we die.
func (k *checkpoint) promiseOption(f *os.File, name, value int) (kept func() error, err error) {
	undo, err := guardian.Option(f, name, value)
	return k.promised(undo, err)
}

// promisePosition has it give an open file its position.
func (k *checkpoint) promisePosition(f *os.File, offset int64) (kept func() error, err error) {
	undo, err := guardian.Position(f, offset)
	return k.promised(undo, err)
}

func (k *checkpoint) promised(undo guardian.Undo, err error) (kept func() error, _ error) {
	if err != nil {
		return nil, err
	}
	entry, err := k.guard.Promise(undo)
	return func() error { return k.guard.Strike(entry) }, err
}

// expect begins to prepare what takes long and will be needed at the stop.
func (k *checkpoint) expect() error {
	pids, err := k.c.cgroup.Processes()
	if err == nil {
		k.learned.expect(pids)
	}
	return err
}

// fill makes the records that describe the machine and this program.
func (h *headRecords) fill(options image.Options) error {
	h.header = image.Header{
		Magic: image.HeaderMagic, Revision: image.Revision, ByteOrder: "little", Tool: Version,
		Options: options,
	}
	if _, err := rand.Read(h.header.ID[:]); err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	h.header.Uname = image.Uname{
		Sysname: unix.ByteSliceToString(u.Sysname[:]), Release: unix.ByteSliceToString(u.Release[:]),
		Version: unix.ByteSliceToString(u.Version[:]), Machine: unix.ByteSliceToString(u.Machine[:]),
	}
	h.arch = machine()
	h.arch.Machine = h.header.Uname.Machine
	return nil
}

// surveys and surveyPause say how often, and how far apart, a running container
// is looked at.
const (
	surveys     = 4
	surveyPause = 5 * time.Millisecond
)

// survey looks at the running container and refuses what cannot be saved,
// before anything is stopped. While tasks come and go, what is seen need not
// hang together: only what is refused twice for the same reason is; for the
// rest the stop decides.
func (k *checkpoint) survey(ctx context.Context) error {
	var last error
	for range surveys {
		err := k.look()
		if err == nil || ctx.Err() != nil {
			return err
		}
		if last != nil && err.Error() == last.Error() && !errors.Is(err, tracee.ErrGone) {
			return err
		}
		last = err
		time.Sleep(surveyPause)
	}
	k.Log.Debug("undecided by the survey", "last", last)
	return nil
}

// look is one survey. It also makes sure of room for the image.
func (k *checkpoint) look() error {
	pids, err := k.c.cgroup.Processes()
	if err != nil {
		return err
	}
	n, err := k.c.takeCensus(pids, true)
	if err != nil {
		return err
	}
	defer n.Close()
	if n.hasSemaphores() {
		k.learned.undos.expect()
	}
	if n.files.HasTerminals() {
		k.learned.terminals.expect()
	}
	if i := slices.IndexFunc(n.procs, func(p *process) bool { return p.space.HasRings() }); i >= 0 {
		if _, err := k.learned.rings.ready(); err != nil {
			return fail.In(n.procs[i].name(), mm.RefuseRings(err))
		}
	}
	if err := k.readQueues(n, false); err != nil {
		return err
	}
	for _, check := range []func() error{
		n.checkSharing, n.checkCalls, n.files.Fits,
		func() error { return k.confine.check(n, k.c.warn) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	tree, err := n.tree(k.c)
	if err == nil {
		var any image.Ref // no reference is given out yet
		n.nest(&tree, nil, func() image.Ref { any++; return any })
		_, err = n.planGrowth(&tree)
	}
	if err != nil {
		return err
	}
	if n.root != nil && k.LeaveRunning {
		n.root.Flush()
	}
	size := n.files.Weight()
	for _, t := range n.memory {
		size += t.Used
	}
	for _, p := range n.procs {
		if p.space.Pid != p.pid {
			continue // counted where it was read
		}
		s, err := mm.Resident(p.pid)
		if err != nil && !errors.Is(err, tracee.ErrGone) {
			return err
		}
		size += s
	}
	return k.out.room(size)
}

// collect reads everything but page contents into records.
func (k *checkpoint) collect(ctx context.Context) error {
	k.head.header.Time = time.Now().UnixNano()
	if err := k.c.lookAgain(); err != nil {
		return err
	}
	n, err := k.c.takeCensus(k.halt.Pids(), false)
	if err != nil {
		return err
	}
	k.census = n
	k.c.record.Subs = n.cgroups
	teller, err := n.nested.ClockTeller()
	if err == nil {
		err = k.c.readClocks(teller)
	}
	if err != nil {
		return err
	}
	n.files.SettleTimers(k.c.now, k.head.header.Time)
	for _, step := range []func() error{
		func() error { return n.findZombies(k.c) },
		func() error { return k.readTerminals(n) },
		func() error { return k.readQueues(n, true) },
		n.checkSharing,
		n.files.Fits,
		n.files.CheckLocks,
		func() error { return n.files.ReadDatagrams(k.c.warn) },
		func() error { return k.confine.check(n, k.c.warn) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	if k.tree, err = n.tree(k.c); err != nil {
		return err
	}
	for i := range k.c.record.Namespaces {
		k.c.record.Namespaces[i].Ref = k.w.NewRef()
	}
	n.nest(&k.tree, k.c.record.Namespaces, k.w.NewRef)
	growth, err := n.planGrowth(&k.tree)
	if err != nil {
		return err
	}
	if err := k.readWaiting(); err != nil {
		return err
	}
	children := n.family()
	if err := k.collectTasks(ctx, children); err != nil {
		return err
	}
	n.passJobs(children)
	if err := n.warnOfIO(k.c.warn); err != nil {
		return err
	}
	if err := n.noteUndo(k.learned); err != nil {
		return err
	}
	for _, p := range n.procs {
		if err := n.checkThreads(p); err != nil {
			return fail.In(p.name(), err)
		}
	}
	k.head.noteState(n)
	k.warnOfGuests()
	return n.findDonors(growth.Steps)
}

// readTerminals reads what lies unread in terminals, if there are any.
func (k *checkpoint) readTerminals(n *census) error {
	if !n.files.HasTerminals() {
		return nil
	}
	return n.files.Unread(k.learned.unread())
}

// readQueues reads what is in POSIX message queues, if there are any.
func (k *checkpoint) readQueues(n *census, stopped bool) error {
	if !n.files.HasQueues() {
		return nil
	}
	q, err := k.learned.queues.ready()
	if err != nil {
		k.Log.Debug("message queues cannot be read by BPF", "error", err)
		q = nil
	}
	return n.files.ReadQueues(q, n.tablesOf, stopped)
}

// noteState completes the arch record with what an address space shows.
func (h *headRecords) noteState(n *census) {
	for _, a := range n.procs[0].space.Record.Areas {
		if a.Kind == image.AreaVDSO {
			h.arch.VDSOLength = a.End - a.Start
		}
	}
}

// writeHead writes sections 1 to 5.
func (k *checkpoint) writeHead(context.Context) error {
	k.wrote = true
	if err := k.w.Record(image.TypeHeader, 0, &k.head.header); err != nil {
		return err
	}
	if err := k.w.Record(image.TypeArch, 0, &k.head.arch); err != nil {
		return err
	}
	if err := k.w.Record(image.TypeContainer, 0, &k.c.record); err != nil {
		return err
	}
	if err := k.w.Record(image.TypeTree, 0, &k.tree); err != nil {
		return err
	}
	return k.writeObjects()
}

// writeObjects writes section 5: shared objects, each process's own, and the
// processes themselves.
func (k *checkpoint) writeObjects() error {
	n := k.census
	var objects []*object.Object
	for _, t := range n.memory {
		objects = append(objects, t.Objects()...)
	}
	for _, s := range n.shared.Segments() {
		if err := s.Details(); err != nil {
			return fail.On("shared memory "+s.Record.Name, err)
		}
		objects = append(objects, &s.Object)
	}
	for _, s := range n.networks {
		objects = append(objects, &s.Object)
	}
	for _, space := range n.ipc {
		objects = append(objects, space.Objects()...)
	}
	objects = append(objects, n.files.Objects()...)
	for _, p := range n.procs {
		objects = append(append(objects, p.places...), p.hand, &p.space.Object)
	}
	for _, o := range objects {
		if o == nil || o.Ref != 0 {
			continue // none of its own, or shared and written
		}
		if err := o.Write(k.w); err != nil {
			return err
		}
	}
	for _, p := range n.procs {
		n.noteTables(p)
		if err := k.w.Record(image.TypeTask, 0, p.state.Task); err != nil {
			return fail.In(p.name(), err)
		}
	}
	return nil
}

// writeContents writes section 6, as far as it cannot be held for later.
func (k *checkpoint) writeContents(ctx context.Context) error {
	save := mm.NewSaver(k.w)
	save.Progress = func(int) error {
		if err := fault.Point("checkpoint.chunk"); err != nil {
			return err
		}
		return ctx.Err()
	}
	err := k.savePages(save)
	if e := save.Close(); err == nil {
		err = e
	}
	if t := k.census.root; t != nil && k.LeaveRunning {
		t.Hold()
	}
	for _, t := range k.census.memory {
		if err == nil {
			err = t.Save(k.w, func() error { return save.Progress(0) })
		}
	}
	for _, space := range k.census.ipc {
		if err == nil {
			err = space.Contents(k.w)
		}
	}
	if err == nil {
		err = k.census.files.Contents(k.w, save.Progress)
	}
	return err
}

// finishImage writes what is held, and the trailer.
func (k *checkpoint) finishImage(ctx context.Context) error {
	if t := k.census.root; t != nil {
		if err := t.SaveHeld(k.w, ctx.Err); err != nil {
			return err
		}
	}
	if !k.LeaveRunning {
		if err := k.lateSignals(); err != nil {
			return err
		}
	}
	return k.w.Close()
}

// lateSignals adds the signals that came while the image was written: their
// sender has been told that they were sent, and the process they were sent to
// goes on from the image only.
func (k *checkpoint) lateSignals() error {
	for _, p := range k.census.procs {
		late, err := p.state.LateSignals(p.threads)
		if err != nil {
			return fail.In(p.name(), err)
		}
		k.w.Late(late)
	}
	return nil
}

func (k *checkpoint) savePages(save *mm.Saver) error {
	if err := k.saveSegments(save, false); err != nil {
		return err
	}
	late := func(p *process) bool { return p.space.Maps(k.census.files.MappedInside) }
	for _, turn := range []bool{false, true} { // those that are made when all have been forked come last
		for _, p := range k.census.procs {
			if p.space.Pid != p.pid || late(p) != turn {
				continue
			}
			if err := p.space.Save(save.For(p.space.Ref)); err != nil {
				return fail.In(p.name(), err)
			}
		}
	}
	return k.saveSegments(save, true)
}

// saveSegments writes shared memory. System V segments of ipc namespaces that tasks
// have made come behind all address spaces: at restore such a namespace exists when
// all processes do, of which some are forked when others' memory is in.
func (k *checkpoint) saveSegments(save *mm.Saver, late bool) error {
	for _, s := range k.census.shared.Segments() {
		if nested := s.NS != 0 && s.NS != k.c.inodes["ipc"]; nested != late {
			continue
		}
		if err := s.Save(save.For(s.Ref)); err != nil {
			return fail.On("shared memory "+s.Record.Name, err)
		}
	}
	return nil
}

// checkNewcomers looks for processes that were brought into the cgroup while
// the image was written (runc exec, a health check): the image lacks them.
func (k *checkpoint) checkNewcomers(context.Context) error {
	pids, err := k.c.cgroup.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if k.halt.Held[pid] == nil && k.halt.Waiting[pid] == 0 && !task.Ended(pid) {
			comm, _ := task.Comm(pid)
			return fail.In(fmt.Sprintf("task (host %d, %s)", pid, comm), &fail.Error{
				Cause: errors.New("it was brought into the container during the checkpoint"), Remedy: "try again",
			})
		}
	}
	return nil
}

// commit gives the image its name: from here on it is whole.
func (k *checkpoint) commit(context.Context) error {
	k.report.ID, k.report.Bytes = fmt.Sprintf("%x", k.head.header.ID), k.w.Offset()
	return k.out.commit(k.guard)
}

// release ends the stop: the container runs on, or ends.
func (k *checkpoint) release(ctx context.Context) error {
	if !k.LeaveRunning {
		if err := k.silence(ctx); err != nil {
			return err
		}
		k.kill()
		k.report.Stopped = time.Since(k.stopped)
		return nil
	}
	err := errors.Join(k.letGo(), k.restoreQuota())
	k.report.Stopped = time.Since(k.stopped)
	return err
}

// kill ends every process and reaps it: a tracer is told before the parents.
func (k *checkpoint) kill() {
	for _, pid := range k.halt.Pids() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if k.sealed {
		_ = k.halt.Thaw(context.Background()) // cgroup v1 holds even those that are to die
	}
	reapAll(k.halt.Traced())
	for tid := range k.halt.Waiting { // not ours to reap
		for nap := range 1000 {
			if task.Ended(tid) {
				break
			}
			time.Sleep(time.Duration(nap) * time.Microsecond)
		}
	}
	k.halt.Forget()
}

// reapAll waits until killed tasks are gone. There is no order in which to wait
// for one after the other: a leader is not reported before its last thread is
// reaped, and the last thread of a pid namespace's init waits until all other
// tasks in it are (zap_pid_ns_processes in kernel/pid_namespace.c): also one
// that was brought in, which only its parent outside can reap. So it is bounded.
func reapAll(tids []int) {
	const patience = 10 * time.Second
	for begin, nap := time.Now(), 20*time.Microsecond; len(tids) > 0 && time.Since(begin) < patience; nap = min(2*nap, time.Millisecond) {
		left := len(tids)
		tids = slices.DeleteFunc(tids, reaped)
		if len(tids) == left {
			time.Sleep(nap)
		}
	}
}

// reaped collects a task that has ended; it is true also for one that is not
// ours to wait for any more.
func reaped(tid int) bool {
	var status unix.WaitStatus
	got, err := unix.Wait4(tid, &status, unix.WALL|unix.WNOHANG, nil)
	if err != nil {
		return err != unix.EINTR
	}
	return got == tid && (status.Exited() || status.Signaled())
}

// settleAfter does what takes time, when nobody waits any more.
func (k *checkpoint) settleAfter(context.Context) error {
	errs := k.admitArrivals()
	for _, w := range k.c.record.Warnings {
		k.Log.Warn(w)
	}
	if n := k.census.multiplied(); n >= worthAWarning {
		k.Log.Warn("memory is shared by fork with other processes than the one that will fork; it is saved once for each", "bytes", n)
	}
	if !k.LeaveRunning {
		if !k.sealed { // else struck already
			for _, q := range k.quota {
				_ = k.guard.Strike(q.entry) // its cgroup goes with the container
			}
			errs = errors.Join(errs, k.guard.Strike(k.thaw))
		}
		errs = errors.Join(errs, k.c.lib.Destroy())
	}
	return errors.Join(errs, k.out.sync(), k.guard.Dismiss())
}

// putBack undoes everything after a failure, and tells whoever reads the
// stream why it ends.
func (k *checkpoint) putBack(err error) error {
	if k.thaw != 0 {
		err = join(err, k.letGo())
	}
	if k.guard != nil {
		err = join(err, k.guard.Rollback())
		err = join(err, k.guard.Dismiss())
	}
	if k.wrote && k.out.path == "" {
		_ = k.w.Fail(errorRecord(err))
	}
	return err
}

// join adds what went wrong on the way back to the first line, so that it is
// not lost on engines that read no further.
func join(err, more error) error {
	if more == nil {
		return err
	}
	return fmt.Errorf("%w (and while putting the container back: %v)", err, more)
}

func errorRecord(err error) image.Error {
	var e *fail.Error
	if !errors.As(err, &e) {
		return image.Error{Phase: "checkpoint", Cause: err.Error()}
	}
	return image.Error{Phase: e.Phase, Task: e.Task, Object: e.Object, Cause: e.Cause.Error(), Remedy: e.Remedy}
}
