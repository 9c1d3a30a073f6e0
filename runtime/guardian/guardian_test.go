package guardian

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// playJournal promises, acts and strikes. Its two promises for one file give the
// right content only if they are undone in reverse order.
func playJournal(c *coordinator) {
	steps := []func(){
		func() { c.promise(Write(c.file("freezer"), "original")) },
		func() { c.put("freezer", "first") },
		func() { c.promise(Write(c.file("freezer"), "first")) },
		func() { c.put("freezer", "second") },
	}
	var image, quota Entry
	steps = append(steps,
		func() { image = c.promise(Remove(c.file("image"))) },
		func() { c.put("image", "half") },
		func() { helperCheck(c.g.Strike(image)) }, // step 7: the image is whole
		func() { c.promise(RemoveTree(c.file("state"))) },
		func() { helperCheck(os.MkdirAll(c.file("state/inner/most"), 0o700)) },
		func() { quota = c.promise(Write(c.file("quota"), "5000")) },
		func() { c.put("quota", "-1") },
		func() { c.put("quota", "5000"); helperCheck(c.g.Strike(quota)) },
		func() { c.put("quota", "set by the engine") }, // step 13
	)
	for _, step := range steps {
		step()
		c.did()
	}
}

const journalSteps = 13

func TestCoordinatorKilledAtEachStep(t *testing.T) {
	for step := 1; step <= journalSteps; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			dir := t.TempDir()
			put(t, filepath.Join(dir, "freezer"), "original")
			put(t, filepath.Join(dir, "quota"), "5000")
			v := startVictim(t, "journal", dir)
			v.goTo(step)
			if status := v.kill(); status != 0 {
				t.Errorf("the guardian's exit status is %d", status)
			}
			holds(t, filepath.Join(dir, "freezer"), "original")
			exists(t, filepath.Join(dir, "image"), step >= 7)
			exists(t, filepath.Join(dir, "state"), false)
			quota := map[bool]string{false: "5000", true: "set by the engine"}[step == journalSteps]
			holds(t, filepath.Join(dir, "quota"), quota)
		})
	}
}

// playRollback dies after its own rollback: nothing may be undone twice.
func playRollback(c *coordinator) {
	c.promise(Write(c.file("freezer"), "original"))
	c.put("freezer", "first")
	helperCheck(c.g.Rollback())
	c.put("freezer", "frozen by the engine")
	c.did()
}

func TestKilledAfterRollback(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "freezer"), "original")
	v := startVictim(t, "rollback", dir)
	v.goTo(1)
	v.kill()
	holds(t, filepath.Join(dir, "freezer"), "frozen by the engine")
}

// playSystem makes what a restore makes: cgroups with frozen tasks in them, a
// process outside, a mount.
func playSystem(c *coordinator) {
	freezer, cpu := "/sys/fs/cgroup/freezer/"+filepath.Base(c.dir), "/sys/fs/cgroup/cpu/"+filepath.Base(c.dir)
	unified := "/sys/fs/cgroup/unified/" + filepath.Base(c.dir)
	c.promise(RemoveCgroups([]string{cpu, freezer, unified}))
	for _, dir := range []string{freezer, freezer + "/sub", cpu, unified, unified + "/sub"} {
		helperCheck(os.Mkdir(dir, 0o755))
	}
	c.say("v1 %d", sleeper(freezer+"/sub", cpu))
	c.say("v2 %d", sleeper(unified+"/sub"))
	helperCheck(writeOnce(freezer+"/freezer.state", []byte("FROZEN")))
	helperCheck(writeOnce(unified+"/cgroup.freeze", []byte("1")))
	outside := sleeper()
	start, err := startTime(outside)
	helperCheck(err)
	c.promise(Kill(outside, start))
	c.say("outside %d", outside)
	c.promise(Unmount(c.file("mount")))
	helperCheck(unix.Mount("none", c.file("mount"), "tmpfs", 0, "size=64k"))
	c.did()
}

// sleeper starts a process that outlives a kill of the coordinator's group.
func sleeper(cgroups ...string) int {
	cmd := exec.Command("setsid", "sleep", "1000")
	helperCheck(cmd.Start())
	for _, dir := range cgroups {
		helperCheck(writeOnce(dir+"/cgroup.procs", []byte(strconv.Itoa(cmd.Process.Pid))))
	}
	time.Sleep(20 * time.Millisecond) // setsid has left the group
	return cmd.Process.Pid
}

func TestCgroupsProcessAndMountPutBack(t *testing.T) {
	dir, err := os.MkdirTemp("", "guardian-test-")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	check(t, os.Mkdir(filepath.Join(dir, "mount"), 0o700))
	v := startVictim(t, "system", dir)
	v.goTo(1)
	if status := v.kill(); status != 0 {
		t.Errorf("the guardian's exit status is %d", status)
	}
	for _, hierarchy := range []string{"freezer", "cpu", "unified"} {
		exists(t, filepath.Join("/sys/fs/cgroup", hierarchy, filepath.Base(dir)), false)
	}
	for _, name := range []string{"v1", "v2", "outside"} {
		if status := reap(t, v.told[name]); status != -int(unix.SIGKILL) {
			t.Errorf("process %s ended with %d", name, status)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	if strings.Contains(string(mounts), dir) {
		t.Error("the mount is still there")
	}
}

// playSeal has two ways back, one after the other.
func playSeal(c *coordinator) {
	c.promise(Write(c.file("back"), "original"))
	c.put("back", "changed")
	_, err := c.g.Prepare(Write(c.file("forward"), "done"))
	helperCheck(err)
	c.did()
	helperCheck(c.g.Seal())
	c.did()
}

func TestSeal(t *testing.T) {
	for step, want := range map[int][2]string{1: {"original", "begun"}, 2: {"changed", "done"}} {
		dir := t.TempDir()
		put(t, filepath.Join(dir, "back"), "original")
		put(t, filepath.Join(dir, "forward"), "begun")
		v := startVictim(t, "seal", dir)
		v.goTo(step)
		v.kill()
		holds(t, filepath.Join(dir, "back"), want[0])
		holds(t, filepath.Join(dir, "forward"), want[1])
	}
}

// playLeak gives a child a copy of its end of the journal.
func playLeak(c *coordinator) {
	_, err := unix.Dup(c.g.journal) // dup(2) drops close-on-exec
	helperCheck(err)
	c.say("child %d", sleeper())
	c.promise(Write(c.file("freezer"), "original"))
	c.put("freezer", "first")
	c.did()
}

func TestCoordinatorsEndLeaked(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "freezer"), "original")
	v := startVictim(t, "leak", dir)
	v.goTo(1)
	v.kill()
	holds(t, filepath.Join(dir, "freezer"), "original")
	if err := unix.Kill(v.told["child"], unix.SIGKILL); err != nil {
		t.Errorf("the child with the copy did not outlive the guardian: %v", err)
	}
	reap(t, v.told["child"])
}

// playStorm promises, acts, puts back and strikes without pause.
func playStorm(c *coordinator) {
	c.say("ready %d", 0)
	for {
		c.promise(Write(c.file("freezer"), "original"))
		c.put("freezer", "dirty")
		c.promise(Remove(c.file("image")))
		c.put("image", "half")
		helperCheck(c.g.Rollback())
		e := c.promise(Write(c.file("freezer"), "original"))
		c.put("freezer", "dirtier")
		c.put("freezer", "original")
		helperCheck(c.g.Strike(e))
	}
}

func TestCoordinatorKilledAtAnyMoment(t *testing.T) {
	for range 40 {
		dir := t.TempDir()
		put(t, filepath.Join(dir, "freezer"), "original")
		v := startVictim(t, "storm", dir)
		v.until("ready")
		time.Sleep(time.Duration(rand.IntN(8000)) * time.Microsecond)
		if status := v.kill(); status != 0 {
			t.Errorf("the guardian's exit status is %d", status)
		}
		holds(t, filepath.Join(dir, "freezer"), "original")
		exists(t, filepath.Join(dir, "image"), false)
	}
}

func TestGuardianKeepsApart(t *testing.T) {
	var inherited []*os.File
	for range 4 {
		r, w, err := os.Pipe()
		check(t, err)
		defer r.Close()
		defer w.Close()
		inherited = append(inherited, w)
	}
	dir := t.TempDir()
	put(t, filepath.Join(dir, "freezer"), "original")
	v := startVictim(t, "journal", dir, inherited...)
	v.goTo(2)
	proc := fmt.Sprintf("/proc/%d/", v.guardian)
	if sid, err := unix.Getsid(v.guardian); err != nil || sid != v.guardian {
		t.Errorf("session %d, error %v", sid, err)
	}
	if pgid, err := unix.Getpgid(v.guardian); err != nil || pgid != v.guardian {
		t.Errorf("process group %d, error %v", pgid, err)
	}
	if cwd, err := os.Readlink(proc + "cwd"); err != nil || cwd != "/" {
		t.Errorf("works in %s, error %v", cwd, err)
	}
	cmdline, err := os.ReadFile(proc + "cmdline")
	if err != nil || string(cmdline) != "ocickpt-guardian\x00guardian\x000\x00" {
		t.Errorf("command line %q, error %v", cmdline, err)
	}
	holdsNoForeignDescriptors(t, proc+"fd")
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE, unix.SIGQUIT} {
		check(t, unix.Kill(v.guardian, sig))
	}
	time.Sleep(10 * time.Millisecond)
	if status := v.kill(); status != 0 {
		t.Errorf("the guardian's exit status is %d", status)
	}
	holds(t, filepath.Join(dir, "freezer"), "original")
}

// holdsNoForeignDescriptors: standard streams on /dev/null, one socket, one
// pidfd, and what the Go runtime polls with.
func holdsNoForeignDescriptors(t *testing.T, dir string) {
	t.Helper()
	fds, err := os.ReadDir(dir)
	check(t, err)
	var sockets int
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		check(t, err)
		kind, _, _ := strings.Cut(target, ":[")
		switch kind {
		case "/dev/null", "anon_inode", "pidfd":
		case "socket":
			sockets++
		default:
			if !strings.HasPrefix(target, "anon_inode:") {
				t.Errorf("descriptor %s is %s", fd.Name(), target)
			}
		}
	}
	if sockets != 1 {
		t.Errorf("%d sockets, want 1", sockets)
	}
}

func TestDismissLeavesNothing(t *testing.T) {
	other := exec.Command("true")
	check(t, other.Start())
	warm, err := Start() // the runtime opens its poller with the first one
	check(t, err)
	check(t, warm.Dismiss())
	before := countDescriptors(t)
	for range 3 {
		file := put(t, filepath.Join(t.TempDir(), "file"), "new")
		g, err := Start()
		check(t, err)
		_, err = g.Promise(Write(file, "old"))
		check(t, err)
		check(t, g.Dismiss())
		holds(t, file, "new") // what stands is to stay
		if err := unix.Kill(g.Pid(), 0); !errors.Is(err, unix.ESRCH) {
			t.Errorf("pid %d is still there: %v", g.Pid(), err)
		}
		check(t, g.Dismiss())
		if _, err := g.Promise(Remove(file)); err == nil {
			t.Error("a dismissed guardian takes a promise")
		}
	}
	if after := countDescriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	check(t, other.Wait()) // nobody else reaped it
}

func TestRollbackUndoesInReverse(t *testing.T) {
	dir := t.TempDir()
	file := put(t, filepath.Join(dir, "file"), "original")
	kept := put(t, filepath.Join(dir, "kept"), "image")
	g, err := Start()
	check(t, err)
	for _, step := range []string{"original", "first", "second"} {
		_, err := g.Promise(Write(file, step))
		check(t, err)
		put(t, file, "after "+step)
	}
	struck, err := g.Promise(Remove(kept))
	check(t, err)
	check(t, g.Strike(struck))
	if err := g.Strike(struck); err == nil {
		t.Error("an entry is struck twice")
	}
	check(t, g.Rollback())
	holds(t, file, "original")
	holds(t, kept, "image")
	put(t, file, "later")
	check(t, g.Rollback())
	holds(t, file, "later")
	check(t, g.Dismiss())
}

func TestRollbackGoesOnAfterFailure(t *testing.T) {
	dir := t.TempDir()
	file := put(t, filepath.Join(dir, "file"), "changed")
	g, err := Start()
	check(t, err)
	for _, u := range []Undo{Write(file, "original"), Remove(dir), Write(dir, "a directory cannot be written")} {
		_, err := g.Promise(u)
		check(t, err)
	}
	err = g.Rollback()
	if !errors.Is(err, unix.EISDIR) || strings.Count(err.Error(), dir) < 2 {
		t.Errorf("error is %v, want both failures", err)
	}
	holds(t, file, "original")
	check(t, g.Dismiss())
}

func TestDeadGuardian(t *testing.T) {
	file := put(t, filepath.Join(t.TempDir(), "file"), "original")
	g, err := Start()
	check(t, err)
	_, err = g.Promise(Write(file, "original"))
	check(t, err)
	put(t, file, "changed")
	check(t, unix.Kill(g.Pid(), unix.SIGKILL))
	eventually(t, "promises fail", func() bool { _, err = g.Promise(Remove(file + ".new")); return err != nil })
	if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("error is %v", err)
	}
	if g.Rollback() == nil {
		t.Error("the rollback does not say that the guardian is dead")
	}
	holds(t, file, "original")
	if g.Dismiss() == nil {
		t.Error("the dismissal does not say that the guardian is dead")
	}
}

// A guardian that is stopped cannot take the word; it must not hold us up.
func TestDismissOfStoppedGuardian(t *testing.T) {
	g, err := Start()
	check(t, err)
	check(t, unix.Kill(g.Pid(), unix.SIGSTOP))
	begin := time.Now()
	if err := g.Dismiss(); err == nil {
		t.Error("no error")
	}
	if took := time.Since(begin); took > patience+2*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestGuardianByHand(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", Verb)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "not by hand") {
		t.Errorf("%q, %v", out, err)
	}
}
