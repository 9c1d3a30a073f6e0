package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime"
)

var checkpointCommand = &cli.Command{
	Name:      "checkpoint",
	Usage:     "save a running container and end it",
	ArgsUsage: "CONTAINER",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "image-path", Value: "checkpoint", Usage: "directory that gets " + runtime.ImageFile},
		&cli.StringFlag{Name: "image", Usage: "file for the image, or - for standard output"},
		&cli.StringFlag{Name: "work-path", Usage: "directory for logs"},
		&cli.BoolFlag{Name: "leave-running", Usage: "let the container go on afterwards"},
		&cli.BoolFlag{Name: "rootfs-diff", Usage: "save what the container has changed in its root file system, an overlay"},
		&cli.StringFlag{Name: "rootfs-manifest", Usage: "likewise where it is none: `FILE` is of ocickpt manifest, before the first start"},
		&cli.BoolFlag{Name: "tcp-established", Usage: "keep connections of TCP"},
		&cli.GenericFlag{Name: "ext-unix-sk", Value: &outsideFlag{}, Usage: "unix sockets with peers outside: reconnect, or disconnect"},
		&cli.BoolFlag{Name: "tcp-skip-in-flight", Usage: "let connections be reset that no program has accepted yet"},
		&cli.StringSliceFlag{Name: "external", Usage: "leave an open file out, to be given at the restore: fd[PID:N], pipe[INODE], socket[INODE], file[DEVICE:INODE], tty[DEVICE:INODE]"},
		&cli.StringFlag{Name: "exec-sessions", Value: "keep", Usage: "processes of runc exec: keep them, or fail"},
		emptyNamespaces,
	},
	Action: checkpoint,
}

// emptyNamespaces is runc's flag of that name, which knows one type.
var emptyNamespaces = &cli.StringSliceFlag{Name: "empty-ns", Usage: "leave what is in a namespace to the engine: network"}

func emptyNetwork(c *cli.Context) (bool, error) {
	for _, kind := range c.StringSlice("empty-ns") {
		if kind != "network" {
			return false, fmt.Errorf("--empty-ns %s: only network can be left to the engine", kind)
		}
	}
	return c.IsSet("empty-ns"), nil
}

// outsideFlag is --ext-unix-sk, which engines give without a value: as reconnect.
type outsideFlag struct{ value string }

func (*outsideFlag) IsBoolFlag() bool { return true }
func (f *outsideFlag) String() string { return f.value }

func (f *outsideFlag) Set(value string) error {
	switch {
	case value == "true":
		value = runtime.ExtUnixSKs[0]
	case value == "false":
		value = ""
	case !slices.Contains(runtime.ExtUnixSKs, value):
		return fmt.Errorf("it is one of %s", strings.Join(runtime.ExtUnixSKs, ", "))
	}
	f.value = value
	return nil
}

func checkpoint(c *cli.Context) error {
	id, err := oneArgument(c, "a container's id")
	if err != nil {
		return err
	}
	log, err := logger(c)
	if err != nil {
		return err
	}
	path, stream, err := imageOut(c)
	if err != nil {
		return err
	}
	sessions := c.String("exec-sessions")
	if sessions != "keep" && sessions != "fail" {
		return fmt.Errorf("--exec-sessions %s: it is keep or fail", sessions)
	}
	empty, err := emptyNetwork(c)
	if err != nil {
		return err
	}
	r, err := runtime.Checkpoint(c.Context, runtime.CheckpointOptions{
		Root: c.String("root"), ID: id, Path: path, Stream: stream, LeaveRunning: c.Bool("leave-running"),
		ExtUnixSK: c.Generic("ext-unix-sk").(*outsideFlag).value, TCPEstablished: c.Bool("tcp-established"), SkipInFlight: c.Bool("tcp-skip-in-flight"),
		RefuseExec: sessions == "fail", EmptyNetwork: empty, External: c.StringSlice("external"), RootfsDiff: c.Bool("rootfs-diff"), RootfsManifest: c.String("rootfs-manifest"), Log: log,
	})
	if work := c.String("work-path"); work != "" {
		err = errors.Join(err, dumpLog(work, err))
	}
	if err != nil {
		return err
	}
	logReport(log, "checkpointed", r)
	return nil
}

// imageOut is where the image goes: a path, or a stream.
func imageOut(c *cli.Context) (string, io.Writer, error) {
	switch image := c.String("image"); {
	case image != "" && c.IsSet("image-path"):
		return "", nil, errors.New("--image and --image-path exclude each other")
	case image == "-":
		if isTerminal(os.Stdout) {
			return "", nil, errors.New("--image -: the image is binary and standard output is a terminal; redirect it")
		}
		return "", stream(c.Context, 1, unix.O_WRONLY), nil
	case image != "":
		path, err := filepath.Abs(image)
		return path, nil, err
	}
	dir, err := filepath.Abs(c.String("image-path"))
	if err != nil {
		return "", nil, err
	}
	return filepath.Join(dir, runtime.ImageFile), nil, nil
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// dumpLog leaves the file that containerd's shim copies: it must exist.
func dumpLog(dir string, failure error) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("work path: %w", err)
	}
	text := "checkpoint done\n"
	if failure != nil {
		text = failure.Error() + "\n"
	}
	return os.WriteFile(filepath.Join(dir, "dump.log"), []byte(text), 0o600)
}
