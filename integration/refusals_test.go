package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ocickpt/ocickpt/image"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mustRefuse asserts how ocickpt says no: exit status 1 and one line on
// standard error, which holds every one of the words.
func (r result) mustRefuse(t testing.TB, words ...string) {
	t.Helper()
	if r.code != 1 {
		t.Errorf("exit status %d, not 1\n%s%s", r.code, r.stdout, r.stderr)
	}
	message := strings.TrimSuffix(r.stderr, "\n")
	if message == "" || strings.Contains(message, "\n") {
		t.Errorf("the error is not one line: %q", r.stderr)
	}
	for _, word := range words {
		if !strings.Contains(message, word) {
			t.Errorf("the error does not mention %q: %s", word, message)
		}
	}
}

func TestRefusedCheckpoint(t *testing.T) {
	c := treeContainer(t)
	untouched := func(t *testing.T) {
		t.Helper()
		c.mustBe(specs.StateRunning)
		c.progress(5)
	}
	c.step(t, "unknown id", func(t *testing.T) {
		c.ocickpt("checkpoint", "--image-path", c.newImage(), "nobody").mustRefuse(t, "nobody")
		absent(t, c.image())
		untouched(t)
	})
	c.step(t, "unwritable path", func(t *testing.T) {
		c.ocickpt("checkpoint", "--image-path", "/proc/image", c.id).mustRefuse(t, "/proc/image")
		untouched(t)
	})
	c.step(t, "full disk", func(t *testing.T) {
		c.ocickpt("checkpoint", "--image", "/dev/full", c.id).mustRefuse(t)
		untouched(t)
	})
	c.step(t, "closed pipe", func(t *testing.T) {
		reader, writer, err := os.Pipe()
		c.must(err)
		reader.Close()
		defer writer.Close()
		c.command(outputs{stdout: writer}, c.binary(), "--root", c.root,
			"checkpoint", "--image", "-", c.id).mustRefuse(t)
		untouched(t)
	})
	c.step(t, "stopped container", func(t *testing.T) {
		c.runc("kill", c.id, "KILL")
		<-c.gone
		c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "stopped")
		c.mustBe(specs.StateStopped)
	})
}

func absent(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); err == nil {
		t.Errorf("%s was left behind", path)
	}
}

// TestUnsupported holds objects that no checkpoint saves yet; each must be
// refused by name, with the container going on.
func TestUnsupported(t *testing.T) {
	// busybox's nc keeps an established connection to itself.
	const script = `sleep 1; nc -l -p 7000 -e sleep 1000 & sleep 2
		sleep 1000 | nc 127.0.0.1 7000 & exec /bin/tree.sh`
	t.Run("tcp connection", func(t *testing.T) {
		c := newContainer(t, withReport("tree"), withArgs("sh", "-c", script)).run().raiseLoopback()
		c.progress(20)
		if !waitFor(func() bool { return established(c.state().Pid) > 0 }) {
			t.Fatal("no connection was made")
		}
		c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "7000")
		c.mustBe(specs.StateRunning)
		c.progress(10)
	})
	for object, words := range map[string][]string{
		"secret": {"survey", "memfd_secret"}, "uffd": {"survey", "userfaultfd"}, "bare": {"survey", "task 1 ", "fd 4", "a userfaultfd: which address space"},
		"uring":    {"survey", "task 1 ", "fd 4", "io_uring: how it was set up"},
		"judge":    {"survey", "task 1 ", "fd 4", "fanotify", "decides on accesses"},
		"lonely":   {"survey", "task 1 ", "fd 4", "net:[", "no task of the container is in this namespace"},
		"aio":      {"io_setup", "1 requests are under way", "IOCB_CMD_POLL"},
		"mqthread": {"survey", "message queue /told: task 1 waits to be told of a message by a thread (SIGEV_THREAD)"},
	} {
		t.Run(object, func(t *testing.T) {
			c := newContainer(t, withReport("unsupported"), withArgs("/bin/unsupported", object), withCapabilities("CAP_SYS_ADMIN")).run()
			c.progress(3)
			c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, words...)
			if object == "aio" {
				t.Setenv("OCICKPT_NO_BPF", "1")
				c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "survey", "io_setup", "cannot be told")
			}
			c.mustBe(specs.StateRunning)
			c.progress(3)
		})
	}
}

// TestFileValidation changes files between a checkpoint and its restores.
func TestFileValidation(t *testing.T) {
	c := newContainer(t, withReport("memory"), withArgs("/bin/memory")).run()
	c.progress(5)
	c.checkpoint()
	c.mustBeGone()
	program, report := filepath.Join(c.rootfs(), "bin/memory"), c.out("memory")
	was, err := os.Stat(program)
	c.must(err)
	content, err := os.ReadFile(report)
	c.must(err)
	// It is a link to the fixture: change one of its own.
	c.must(run("cp", "-a", program, program+".new"))
	c.must(os.Rename(program+".new", program))

	c.must(os.Chtimes(program, was.ModTime(), was.ModTime().Add(time.Second)))
	c.tryRestore().mustRefuse(t, "/bin/memory", "changed at", "--file-validation")
	c.must(os.Truncate(program, was.Size()+1))
	c.tryRestore("--file-validation=size").mustRefuse(t, "/bin/memory", "bytes instead of")
	c.must(os.Truncate(program, was.Size()))
	c.must(os.Chtimes(program, was.ModTime(), was.ModTime()))

	c.must(os.WriteFile(report, content[:2], 0o644))
	c.tryRestore().mustRefuse(t, "/out/memory", "is open at")
	c.tryRestore("--file-validation=no").mustRefuse(t, "strict, size, none")
	next := fmt.Sprintf("%d\n", bytes.Count(content, []byte("\n"))+1)
	c.must(os.WriteFile(report, append(content, next...), 0o644))
	if r := c.tryRestore(); r.code != 0 || !strings.Contains(r.stderr, "has grown") {
		t.Fatalf("exit status %d\n%s", r.code, r.stderr)
	}
	c.adopt()
}

// TestLockConflict restores while somebody outside has the lock of a file. The
// error names both.
func TestLockConflict(t *testing.T) {
	c := newContainer(t, withReport("locks"), withArgs("/bin/locks")).run()
	c.progress(5)
	c.checkpoint()
	c.mustBeGone()
	f, err := os.Open(c.out("locks.flock"))
	c.must(err)
	defer f.Close()
	c.must(unix.Flock(int(f.Fd()), unix.LOCK_SH))
	c.tryRestore().mustRefuse(t, "/out/locks.flock", fmt.Sprintf("process %d", os.Getpid()))
	c.must(unix.Flock(int(f.Fd()), unix.LOCK_UN))
	c.restore()
	c.progress(20)
}

// TestRemovedReadOnly removes a file from outside of a mount that the container
// may only read: it cannot be made again where it was, and memory takes its place.
func TestRemovedReadOnly(t *testing.T) {
	var host string
	c := newContainer(t, withReport("tree"), withArgs("sh", "-c", "exec 9</host/lib; exec /bin/tree.sh"),
		func(c *container, spec *specs.Spec) {
			host = filepath.Join(c.dir, "host")
			c.must(os.Mkdir(host, 0o755))
			c.must(os.WriteFile(filepath.Join(host, "lib"), []byte("gone from here"), 0o644))
			spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/host", Source: host, Type: "bind", Options: []string{"bind", "ro"}})
		}).run()
	c.progress(10)
	c.must(os.Remove(filepath.Join(host, "lib")))
	for range 2 {
		cycle(c, 1)
		if got := c.exec("cat", "/proc/1/fd/9"); got != "gone from here" {
			t.Fatalf("the removed file holds %q", got)
		}
	}
	if entries, err := os.ReadDir(host); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestRefusedRestore offers restore what it must not take. Nothing may be left
// of the attempts, which leakCheck sees to, and the true image must still work
// afterwards.
func TestRefusedRestore(t *testing.T) {
	c := treeContainer(t)
	c.checkpoint()
	c.mustBeGone()
	good := filepath.Join(c.image(), "checkpoint.img")
	data, err := os.ReadFile(good)
	c.must(err)

	damaged := map[string][]byte{
		"empty":              {},
		"foreign":            []byte(strings.Repeat("#!/bin/sh\necho not an image\n", 999)),
		"truncated head":     data[:1000],
		"truncated contents": data[:len(data)-5000],
		"no trailer":         data[:len(data)-8],
		"corrupted head":     flipped(data, 200),
		"corrupted contents": flipped(data, len(data)/2),
		"appended":           append(bytes.Clone(data), 0),
		"other architecture": reforge(t, data, image.TypeArch, "x86_64", "mips64"),
	}
	for name, bad := range damaged {
		c.step(t, name, func(t *testing.T) {
			path := filepath.Join(c.dir, "damaged.img")
			c.must(os.WriteFile(path, bad, 0o600))
			c.tryRestoreFile(path, c.bundle).mustRefuse(t)
			if name != "other architecture" { // a valid image, for another machine
				c.ocickpt("verify", path).mustRefuse(t)
			}
		})
	}
	c.step(t, "other processor", func(t *testing.T) {
		path := filepath.Join(c.dir, "processor.img")
		c.must(os.WriteFile(path, reforge(t, data, image.TypeArch, "sse4_2", "sse9_9"), 0o600))
		c.tryRestoreFile(path, c.bundle).mustRefuse(t, "processor", "sse9_9")
	})
	c.step(t, "missing image", func(t *testing.T) {
		c.tryRestoreFile("/nowhere.img", c.bundle).mustRefuse(t, "/nowhere.img")
	})
	c.step(t, "missing bundle", func(t *testing.T) {
		c.tryRestoreFile(good, "/nowhere").mustRefuse(t, "/nowhere")
	})
	c.step(t, "existing id", func(t *testing.T) {
		c.restore()
		c.progress(10)
		c.tryRestoreFile(good, c.bundle).mustRefuse(t, c.id)
		c.mustBe(specs.StateRunning)
		c.progress(10)
	})
}

// TestMemoryWithinBundle restores files in memory into bundles that have no
// TestMountsWithinBundle restores a container that has made mounts into bundles
// that do not let it, and takes checkpoints with mounts that nobody can make again.
func TestMountsWithinBundle(t *testing.T) {
	const script = `mkdir /out/m && mount -t tmpfs own /out/m && echo kept >/out/m/file && exec /bin/tree.sh`
	var spec specs.Spec
	keep := func(c *container, s *specs.Spec) {
		// Images for Kubernetes are asked for mounts below /var/run, a link.
		c.must(os.MkdirAll(filepath.Join(c.rootfs(), "var"), 0o755))
		c.must(os.MkdirAll(filepath.Join(c.rootfs(), "run/secrets"), 0o755))
		c.must(os.Symlink("/run", filepath.Join(c.rootfs(), "var/run")))
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/var/run/secrets", Type: "bind", Source: fixtures, Options: []string{"rbind", "ro"}})
		spec = *s
	}
	c := newContainer(t, withReport("tree"), withArgs("sh", "-c", script), withMounting(), keep).run()
	c.progress(5)
	for name, r := range map[string]struct{ make, undo, says string }{
		"type":     {"mkdir /out/r && mount -t ramfs r /out/r", "umount /out/r", "mount /out/r: a file system of type ramfs"},
		"source":   {"mkdir /out/s /out/m/s && mount --bind /out/m/s /out/s && umount /out/m", "umount /out/s; mount -t tmpfs own /out/m; echo kept >/out/m/file", "mount /out/s: what this tmpfs was bound from"},
		"detached": {"mount -t tmpfs d /out/m; sleep 1000 </out/m >/dev/null 2>&1 & echo $! >/out/pid; sleep 0.1; umount -l /out/m", "kill $(cat /out/pid)", "or on a mount that it has unmounted"},
	} {
		c.step(t, name, func(t *testing.T) {
			c.exec("sh", "-c", r.make)
			c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, r.says)
			c.exec("sh", "-c", r.undo)
			c.progress(5)
		})
	}
	c.checkpoint()
	c.mustBeGone()
	good := filepath.Join(c.image(), "checkpoint.img")
	for says, less := range map[string]func(spec *specs.Spec){
		"CAP_SYS_ADMIN": func(spec *specs.Spec) {
			capabilities := *spec.Process.Capabilities
			process := *spec.Process
			capabilities.Bounding = []string{"CAP_KILL"}
			process.Capabilities = &capabilities
			spec.Process = &process
		},
	} {
		c.step(t, says, func(t *testing.T) {
			other := spec
			less(&other)
			c.writeSpec(&other)
			c.tryRestoreFile(good, c.bundle).mustRefuse(t, says)
		})
	}
	c.writeSpec(&spec)
	c.restore()
	c.progress(5)
	if got := c.exec("cat", "/out/m/file"); got != "kept\n" {
		t.Errorf("the file holds %q", got)
	}
}

// room for them.
func TestMemoryWithinBundle(t *testing.T) {
	c := newContainer(t, withReport("tmpfs"), withArgs("/bin/tmpfs"), withTmpfs("/run")).run()
	c.progress(5)
	c.checkpoint()
	c.mustBeGone()
	c.refusesBundles(t, map[string][3]string{
		"not mounted": {`"destination": "/run"`, `"destination": "/out"`, "the bundle mounts none there"},
		"too small":   {`"size=65536k"`, `"size=512k"`, "/dev/shm"},
	})
	c.restore()
	c.progress(5)
}

// TestQueuesWithinBundle asks for POSIX message queues without BPF, and restores
// them into bundles that do not let them be.
func TestQueuesWithinBundle(t *testing.T) {
	c := newContainer(t, withReport("mqueues"), withArgs("/bin/mqueues")).run()
	c.progress(3)
	c.step(t, "without BPF", func(t *testing.T) {
		t.Setenv("OCICKPT_NO_BPF", "1")
		c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "survey", "message queue /", "only BPF")
		c.mustBe(specs.StateRunning)
		c.progress(3)
	})
	c.checkpoint()
	c.mustBeGone()
	c.refusesBundles(t, map[string][3]string{
		"the host's namespace": {`"type": "ipc"`, `"type": "cgroup"`, "no ipc namespace of its own"},
		"smaller messages":     {`"linux": {`, `"linux": {"sysctl": {"fs.mqueue.msgsize_max": "4096"},`, "fs.mqueue.msgsize_max"},
		"fewer queues":         {`"linux": {`, `"linux": {"sysctl": {"fs.mqueue.queues_max": "2"},`, "fs.mqueue.queues_max"},
		"another user":         {`"uid": 0`, `"uid": 1000`, "uid 0"},
	})
	c.restore()
	c.progress(3)
}

// TestIPCWithinBundle asks for what can be had of System V IPC only with BPF, and
// restores it into bundles that do not give it a place.
func TestIPCWithinBundle(t *testing.T) {
	c := newContainer(t, withReport("sysv"), withArgs("/bin/sysv")).run()
	c.progress(5)
	c.step(t, "without BPF", func(t *testing.T) {
		t.Setenv("OCICKPT_NO_BPF", "1")
		c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "SEM_UNDO")
		c.mustBe(specs.StateRunning)
		c.progress(5)
	})
	c.checkpoint()
	c.mustBeGone()
	c.refusesBundles(t, map[string][3]string{
		"the host's namespace": {`"type": "ipc"`, `"type": "cgroup"`, "no ipc namespace of its own"},
		"smaller limits":       {`"linux": {`, `"linux": {"sysctl": {"kernel.shmmax": "4096"},`, "System V shm"},
		"another user":         {`"uid": 0`, `"uid": 1000`, "uid 0"},
	})
	c.restore()
	c.progress(5)
}

// refusesBundles tries to restore the last image into the bundle with a text of
// its configuration replaced by another, and expects a refusal that says so.
func (c *container) refusesBundles(t *testing.T, changes map[string][3]string) {
	t.Helper()
	good := filepath.Join(c.image(), "checkpoint.img")
	config := filepath.Join(c.bundle, "config.json")
	spec, err := os.ReadFile(config)
	c.must(err)
	for name, change := range changes {
		c.step(t, name, func(t *testing.T) {
			c.must(os.WriteFile(config, bytes.ReplaceAll(spec, []byte(change[0]), []byte(change[1])), 0o644))
			c.tryRestoreFile(good, c.bundle).mustRefuse(t, change[2])
		})
	}
	c.must(os.WriteFile(config, spec, 0o644))
}

// tryRestoreFile restores from a single file; unlike tryRestore it captures
// standard error, for a container that must not come to be.
func (c *container) tryRestoreFile(path, bundle string) result {
	c.t.Helper()
	return c.ocickpt("restore", "--detach", "--image", path, "--bundle", bundle, c.id)
}

func flipped(data []byte, at int) []byte {
	data = bytes.Clone(data)
	data[at] ^= 0x10
	return data
}

// reforge replaces text by text of the same length in the first record of a
// type and puts all checksums right, as a program that forges images would:
// the CRC of that record, and the digest in the trailer, which covers the
// pre-header and CRC of every record before it (docs/image.md).
func reforge(t *testing.T, stream []byte, of image.Type, old, new string) []byte {
	t.Helper()
	stream = bytes.Clone(stream)
	was, is := sha256.New(), sha256.New()
	replaced := false
	for at := 0; at < len(stream); {
		kind := image.Type(binary.LittleEndian.Uint32(stream[at:]))
		length := int(binary.LittleEndian.Uint64(stream[at+8:]))
		end := at + (16+length+4+7)&^7
		body, crc := stream[at:end-4], stream[end-4:end]
		if kind == image.TypeTrailer {
			copy(body[16:], bytes.Replace(body[16:], was.Sum(nil), is.Sum(nil), 1))
		}
		was.Write(body[:16])
		was.Write(crc)
		if kind == of && !replaced {
			replaced = bytes.Contains(body, []byte(old))
			copy(body[16:], bytes.Replace(body[16:], []byte(old), []byte(new), 1))
		}
		binary.LittleEndian.PutUint32(crc, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
		is.Write(body[:16])
		is.Write(crc)
		at = end
	}
	if !replaced {
		t.Fatalf("no %s record holds %q", of, old)
	}
	return stream
}

// TestReadersNeedNoRoot inspects an image as another user.
func TestReadersNeedNoRoot(t *testing.T) {
	c := treeContainer(t)
	c.checkpoint("--leave-running")
	name := filepath.Join(c.image(), "checkpoint.img")
	for _, path := range []string{c.dir, c.image(), name, fixtures, c.binary()} {
		c.must(os.Chmod(path, fs.FileMode(0o755)))
	}
	for _, verb := range []string{"inspect", "verify"} {
		r := c.command(outputs{}, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
			c.binary(), verb, name)
		if r.code != 0 {
			t.Errorf("%s as nobody: exit status %d\n%s", verb, r.code, r.stderr)
		}
	}
}
