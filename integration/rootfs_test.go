package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// rootRights lets the program of these tests make all that the root of a container
// may make.
var rootRights = withCapabilities("CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID", "CAP_DAC_OVERRIDE", "CAP_MKNOD", "CAP_SETFCAP")

// fillRoot puts into a root file system what the program rootfs changes.
func fillRoot(c *container) {
	c.t.Helper()
	data := filepath.Join(c.rootfs(), "data")
	for _, dir := range []string{"gonedir/b", "opaque", "dirfile", "modedir", "deep/er", "moved"} {
		c.must(os.MkdirAll(filepath.Join(data, dir), 0o755))
	}
	for _, name := range []string{"gone", "gonedir/a", "gonedir/b/c", "opaque/x", "opaque/y", "changed", "filedir", "dirfile/in", "hard1",
		"mode", "kept", "moved/inside", "deep/er/from", "deep/er/touched", "deep/er/untouched"} {
		c.must(os.WriteFile(filepath.Join(data, name), []byte(name+"\n"), 0o644))
	}
	c.must(os.Link(filepath.Join(data, "hard1"), filepath.Join(data, "hard2")))
}

// overlay mounts an empty upper directory, made in dir, over the root file system,
// as an engine does for a new container.
func (c *container) overlay(dir, options string) {
	c.t.Helper()
	layers, err := os.MkdirTemp(dir, "layers-")
	c.must(err)
	for _, dir := range []string{"upper", "work"} {
		c.must(os.Mkdir(filepath.Join(layers, dir), 0o755))
	}
	data := fmt.Sprintf("lowerdir=%s,upperdir=%[2]s/upper,workdir=%[2]s/work%s", c.rootfs(), layers, options)
	c.must(unix.Mount("overlay", c.rootfs(), "overlay", 0, data))
	c.t.Cleanup(func() { _ = unix.Unmount(c.rootfs(), 0) })
}

// TestRootfsDiffOverlay moves a container with what it has changed in its root:
// after each checkpoint the root is the bare image again.
func TestRootfsDiffOverlay(t *testing.T) {
	c := newContainer(t, withReport("rootfs"), rootRights, withNewPrivileges(), withArgs("/bin/rootfs", "rights", "move"))
	fillRoot(c)
	c.overlay(c.dir, ",redirect_dir=on,metacopy=on")
	c.run().progress(10)
	for generation := range 2 {
		c.checkpoint("--rootfs-diff")
		c.mustBeGone()
		c.must(unix.Unmount(c.rootfs(), 0))
		c.overlay(c.dir, []string{"", ",redirect_dir=on"}[generation])
		c.restore()
		c.progress(10)
	}
	c.checkpoint("--rootfs-diff", "--leave-running")
	c.progress(10)
	if left, _ := filepath.Glob(filepath.Join(c.rootfs(), ".ocickpt*")); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, " "))
	}
}

// sharing mounts a file system that can share blocks between files.
func (c *container) sharing() string {
	c.t.Helper()
	disk, dir := filepath.Join(c.dir, "disk"), filepath.Join(c.dir, "sharing")
	c.must(os.Mkdir(dir, 0o755))
	c.must(run("truncate", "-s", "300M", disk)) // mkfs.xfs makes no smaller one
	c.must(run("mkfs.xfs", "-q", disk))
	c.must(run("mount", "-o", "loop", disk, dir))
	c.t.Cleanup(func() { c.must(run("umount", "--lazy", dir)) }) // what a failed test has left may still be in use
	return dir
}

// TestRootfsDiffHeld changes files while a container runs again, and its image is
// yet to be finished: in it they are as they were at the stop.
func TestRootfsDiffHeld(t *testing.T) {
	const size = 16 << 20
	c := newContainer(t, withReport("counts"), withArgs("/bin/sh", "-c", "n=0; while n=$((n+1)); do echo $n >>/out/counts; sleep 0.01; done"))
	disk := c.sharing()
	c.overlay(disk, "")
	old := bytes.Repeat([]byte("as it was at the stop\n"), size/22)
	big := filepath.Join(c.rootfs(), "out/big")
	c.must(os.WriteFile(big, old, 0o644))
	c.run().progress(10)
	for _, again := range []bool{false, true} {
		t.Setenv(envFault, "finish the image:stop")
		cmd := c.foreground("checkpoint", "--rootfs-diff", "--leave-running", "--image-path", c.newImage(), c.id)
		t.Setenv(envFault, "")
		if !waitFor(func() bool { return processState(cmd.Process.Pid) == 'T' }) {
			t.Fatal("the checkpoint does not come to the end of its image")
		}
		c.progress(10)
		c.must(os.WriteFile(big, make([]byte, size+1), 0o644))
		written, err := filepath.Glob(filepath.Join(c.image(), ".checkpoint.img.*"))
		c.must(err)
		if st, err := os.Stat(strings.Join(written, " ")); err != nil || st.Size() >= size {
			t.Fatalf("the image is %v (%v): it was written while the container stood still", st, err)
		}
		c.must(cmd.Process.Signal(unix.SIGCONT))
		if err := cmd.Wait(); err != nil {
			t.Fatalf("checkpoint: %v\n%s", err, c.stderr())
		}
		c.destroy()
		c.must(unix.Unmount(c.rootfs(), 0))
		c.overlay(disk, "")
		c.restore()
		c.progress(10)
		if got, err := os.ReadFile(big); err != nil || !bytes.Equal(got, old) {
			t.Errorf("restored again=%v: %d bytes that are not those of the stop (%v)", again, len(got), err)
		}
	}
}

// TestRootfsDiffManifest does the same with a plain directory, which is put back
// from a copy; in a user namespace, where nothing may be given to others.
func TestRootfsDiffManifest(t *testing.T) {
	for name, options := range map[string][]option{
		"own":    {rootRights, withNewPrivileges(), withArgs("/bin/rootfs", "rights", "move")},
		"mapped": {withUserNamespace(), withArgs("/bin/rootfs")},
	} {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, append([]option{withReport("rootfs")}, options...)...)
			fillRoot(c)
			// A name that another test adds to a program, or takes away, is a change.
			bin, own := filepath.Join(c.rootfs(), "bin"), filepath.Join(c.dir, "own")
			c.must(run("cp", "-a", bin, own))
			c.must(os.RemoveAll(bin))
			c.must(run("cp", "-a", own, bin))
			c.must(os.RemoveAll(own))
			if name == "mapped" { // what the container changes must be its own
				c.must(run("chown", "-R", "100000:100000", filepath.Join(c.rootfs(), "data"), filepath.Join(c.rootfs(), "out")))
			}
			base, manifest := filepath.Join(c.dir, "base"), filepath.Join(c.dir, "manifest")
			c.must(run("cp", "-a", c.rootfs(), base))
			c.manifest(manifest)
			c.run().progress(10)
			c.ocickpt("checkpoint", "--image-path", c.newImage(), "--rootfs-diff", c.id).mustRefuse(t, "root file system", "--rootfs-manifest")
			for range 2 {
				c.runc("pause", c.id)
				before := c.look()
				c.checkpoint("--rootfs-manifest", manifest)
				c.mustBeGone()
				c.must(os.RemoveAll(c.rootfs()))
				c.must(run("cp", "-a", base, c.rootfs()))
				c.manifest(manifest)
				c.restore("--leave-frozen")
				if after := c.look(); after != before {
					t.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
				c.runc("resume", c.id)
				c.progress(10)
			}
		})
	}
}

// manifest describes the root file system as it is now.
func (c *container) manifest(name string) {
	c.t.Helper()
	r := c.ocickpt("manifest", c.rootfs())
	if r.code != 0 {
		c.t.Fatalf("manifest: exit status %d\n%s", r.code, r.stderr)
	}
	c.must(os.WriteFile(name, []byte(r.stdout), 0o600))
}

// TestRootfsDiffPutBack has restores fail and die after they have begun to change
// the root: it is as it was before, or the restore was as good as done.
func TestRootfsDiffPutBack(t *testing.T) {
	c := newContainer(t, withReport("rootfs"), rootRights, withNewPrivileges(), withArgs("/bin/rootfs", "rights", "move"))
	fillRoot(c)
	base, manifest := filepath.Join(c.dir, "base"), filepath.Join(c.dir, "manifest")
	c.must(run("cp", "-a", c.rootfs(), base))
	c.manifest(manifest)
	c.run().progress(10)
	c.checkpoint("--rootfs-manifest", manifest)
	c.mustBeGone()
	c.must(os.RemoveAll(c.rootfs()))
	c.must(run("cp", "-a", base, c.rootfs()))
	before := c.look()
	putBack := func(t *testing.T) {
		t.Helper()
		var now string
		if !waitFor(func() bool { now = c.look(); return now == before }) {
			t.Fatalf("before:\n%s\nafter:\n%s", before, now)
		}
		for _, pattern := range []string{filepath.Join(c.rootfs(), ".ocickpt*"), "/run/ocickpt/aside-*"} {
			if left, _ := filepath.Glob(pattern); !waitFor(func() bool { left, _ = filepath.Glob(pattern); return len(left) == 0 }) {
				t.Errorf("left behind: %s", strings.Join(left, " "))
			}
		}
	}
	for _, point := range []string{"restore.aside", "tmpfs.job#3", "grow the forest", "restore.chunk#2", "settle"} {
		for _, action := range []string{"fail", "kill"} {
			c.step(t, point+" "+action, func(t *testing.T) {
				t.Setenv(envFault, point+":"+action)
				r := c.tryRestore()
				t.Setenv(envFault, "")
				if r.code == 0 {
					t.Fatal("the restore has not failed")
				}
				putBack(t)
			})
		}
	}
	c.step(t, "not allowed", func(t *testing.T) {
		locked := filepath.Join(c.rootfs(), "data/modedir")
		c.must(run("chattr", "+i", locked))
		r := c.tryRestore()
		c.must(run("chattr", "-i", locked))
		r.mustRefuse(t, "root file system", "data/modedir")
		putBack(t)
	})
	c.step(t, "skipped", func(t *testing.T) {
		c.tryRestore("--rootfs-diff", "skip").mustRefuse(t, "/data/")
	})
	c.must(os.Mkdir(filepath.Join(c.rootfs(), ".ocickpt-aside-x"), 0o700))
	c.tryRestore().mustRefuse(t, "root file system", "/.ocickpt-aside-x", "fresh root")
	c.must(os.Remove(filepath.Join(c.rootfs(), ".ocickpt-aside-x")))
	c.restore()
	c.progress(10)
}

// look lists what is in the root file system, with contents of all but what grows.
func (c *container) look() string {
	c.t.Helper()
	const script = `cd $0 && find . -name bin -prune -o -name dev -prune -o -name proc -prune -o -name sys -prune -o -mindepth 1 -printf '%P %y %m %U %G %n %s %b %T@ %l\n' | sort &&
		cd data && find . -type f ! -name sparse ! -name log ! -name mapped | sort | xargs sha256sum && getfattr -dhRm - . 2>/dev/null | sort`
	r := c.command(outputs{}, "sh", "-c", script, c.rootfs())
	if r.code != 0 {
		c.t.Fatalf("look: %s", r.stderr)
	}
	return r.stdout
}
