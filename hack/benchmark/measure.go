package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tool is a program that checkpoints and restores containers of runc.
type tool struct {
	name, binary string
	phases       bool // its log says how long each phase took
}

var (
	ocickpt = tool{"ocickpt", "bin/ocickpt", true}
	runc    = tool{"runc + criu", "runc", false}
)

// box is one container of a workload.
type box struct {
	dir, id string
	workload
}

func (b *box) bundle() string { return filepath.Join(b.dir, "bundle") }
func (b *box) state() string  { return filepath.Join(b.dir, "state") }
func (b *box) image() string  { return filepath.Join(b.dir, "image") }

// measure runs a new container of the workload through one checkpoint and
// restore by the tool.
func measure(dir string, w workload, by tool) (s sample, err error) {
	work, err := os.MkdirTemp(dir, "box-")
	if err != nil {
		return s, err
	}
	b := &box{dir: work, id: filepath.Base(work), workload: w}
	defer func() { err = errors.Join(err, b.remove()) }()
	if err := b.create(); err != nil {
		return s, err
	}
	if s.start, err = b.start(); err != nil {
		return s, err
	}
	pid, err := b.pid()
	if err != nil {
		return s, err
	}
	if err := warmUp(dir, w.mib); err != nil {
		return s, err
	}
	stopped := watchStop(pid)
	s.checkpoint, s.dumpRSS, s.writing, err = b.travel(by, writing, "checkpoint", "--image-path", b.image(), b.id)
	s.stopped = stopped()
	if err != nil {
		return s, err
	}
	if s.image, err = size(b.image()); err != nil {
		return s, err
	}
	if err := warmUp(dir, w.mib); err != nil {
		return s, err
	}
	s.restore, s.restoreRSS, s.reading, err = b.travel(by, reading, "restore", "--detach",
		"--image-path", b.image(), "--bundle", b.bundle(), b.id)
	return s, err
}

// The phases in which an image is written and read. The others make or free what
// has nothing to do with its size, or are the kernel's freeing of memory.
var (
	writing = []string{"write the head", "write the contents", "finish the image", "commit"}
	reading = []string{"read the head", "fill in contents"}
)

// travel runs one journey of a tool. Of ocickpt it also returns how long some of
// its phases took together.
func (b *box) travel(by tool, some []string, args ...string) (wall time.Duration, rss int64, phases time.Duration, err error) {
	global := []string{"--root", b.state()}
	log := filepath.Join(b.dir, args[0]+".log")
	if by.phases {
		global = append(global, "--log", log, "--log-format", "json", "--debug")
	}
	wall, rss, err = b.run(by.binary, append(global, args...)...)
	if err == nil && by.phases {
		phases, err = sumPhases(log, some)
	}
	return wall, rss, phases, err
}

// sumPhases adds up what `ocickpt --debug` says of some phases.
func sumPhases(log string, some []string) (sum time.Duration, err error) {
	f, err := os.Open(log)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := json.NewDecoder(f); ; {
		var line struct {
			Msg, Name string
			Took      time.Duration // nanoseconds
		}
		if err := lines.Decode(&line); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, fmt.Errorf("%s: %w", log, err)
		}
		if line.Msg == "phase" && slices.Contains(some, line.Name) {
			sum += line.Took
		}
	}
	if sum == 0 {
		return 0, fmt.Errorf("%s does not tell how long %s took", log, strings.Join(some, ", "))
	}
	return sum, nil
}

func (b *box) create() error {
	command := []string{b.bundle(), "busybox", "sh", "-c", "while :; do sleep 0.1; done"}
	if b.mib > 0 {
		command = []string{b.bundle(), "host", "/usr/bin/redis-server", "--save", "", "--dir", "/out"}
	}
	_, _, err := b.run("hack/bundle", command...)
	return err
}

func (b *box) start() (time.Duration, error) {
	took, _, err := b.run("runc", "--root", b.state(), "run", "-d", "--bundle", b.bundle(), b.id)
	if err == nil && b.mib > 0 {
		err = b.fill()
	}
	time.Sleep(200 * time.Millisecond) // let it come to rest
	return took, err
}

// fill gives redis its values, of 64 KiB each, in calls of 64 MiB. They are not
// zeros, which an image would not store.
func (b *box) fill() error {
	if err := b.inNet("ip", "link", "set", "lo", "up"); err != nil {
		return err
	}
	for try := 0; b.inNet("redis-cli", "ping") != nil; try++ {
		if try == 100 {
			return errors.New("redis does not answer")
		}
		time.Sleep(50 * time.Millisecond)
	}
	const script = `for i=1,1024 do local k=ARGV[1]..':'..i
		redis.call('SET',k,string.rep(string.format('%16s',k),4096)) end`
	for chunk := range b.mib / 64 {
		if err := b.inNet("redis-cli", "eval", script, "0", strconv.Itoa(chunk)); err != nil {
			return err
		}
	}
	return nil
}

func (b *box) inNet(command ...string) error {
	pid, err := b.pid()
	if err != nil {
		return err
	}
	_, _, err = b.run("nsenter", append([]string{"-t", strconv.Itoa(pid), "-n"}, command...)...)
	return err
}

func (b *box) pid() (int, error) {
	out, err := exec.Command("sh", "-c", `runc --root "$0" state "$1" | jq .pid`, b.state(), b.id).Output()
	if err != nil {
		return 0, fmt.Errorf("runc state: %w", err)
	}
	return strconv.Atoi(strings.TrimSpace(string(out)))
}

func (b *box) remove() error {
	err := exec.Command("runc", "--root", b.state(), "delete", "--force", b.id).Run()
	rootfs := filepath.Join(b.bundle(), "rootfs")
	if b.mib > 0 {
		err = errors.Join(err, unix.Unmount(rootfs, unix.MNT_DETACH))
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

// run runs a command with files, never pipes, as its output, because a
// container that inherits them would keep a pipe's reader waiting. It returns
// wall time and the peak resident size in bytes.
func (b *box) run(name string, args ...string) (time.Duration, int64, error) {
	output, err := os.CreateTemp(b.dir, "output-")
	if err != nil {
		return 0, 0, err
	}
	defer output.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = output, output
	start := time.Now()
	err = cmd.Run()
	took := time.Since(start)
	if err != nil {
		text, _ := os.ReadFile(output.Name())
		return 0, 0, fmt.Errorf("%s %s: %w: %s", name, args[len(args)-1], err, bytes.TrimSpace(text))
	}
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0, 0, errors.New("no resource usage of a finished process")
	}
	return took, usage.Maxrss * 1024, nil // Maxrss counts KiB
}

// watchStop looks from outside how long the task with a pid stands still, frozen
// (D) or in a tracing stop (t): the longest such time until the task ends. Its
// resolution is the quarter of a millisecond between two looks. The function
// returned ends the watch when the task is still there.
func watchStop(pid int) func() time.Duration {
	result, quit := make(chan time.Duration, 1), make(chan struct{})
	go func() {
		var since time.Time
		var longest time.Duration
		for {
			state := taskState(pid)
			switch still := state == 't' || state == 'D'; {
			case still && since.IsZero():
				since = time.Now()
			case !still && !since.IsZero():
				longest = max(longest, time.Since(since))
				since = time.Time{}
			}
			if state == 0 || state == 'Z' || state == 'X' {
				result <- longest
				return
			}
			select {
			case <-quit:
				result <- longest
				return
			case <-time.After(250 * time.Microsecond):
			}
		}
	}()
	return func() time.Duration {
		close(quit)
		return <-result
	}
}

// taskState is the letter after the last ")" of /proc/PID/stat, 0 if the task
// is gone.
func taskState(pid int) byte {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 || i+2 >= len(stat) {
		return 0
	}
	return stat[i+2]
}

func size(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	return total, err
}

// criuBroken tells why runc checkpoint does not work here, nil if it does.
func criuBroken(dir string) error {
	if _, err := exec.LookPath("criu"); err != nil {
		return err
	}
	if _, err := measure(dir, workload{name: "probe"}, runc); err != nil {
		lines := strings.Split(err.Error(), "\n")
		return errors.New(lines[len(lines)-1])
	}
	return nil
}
