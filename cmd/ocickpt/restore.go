package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime"
)

var restoreCommand = &cli.Command{
	Name:      "restore",
	Usage:     "make a container from an image and let it run on",
	ArgsUsage: "CONTAINER",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "image-path", Value: "checkpoint", Usage: "directory that holds " + runtime.ImageFile},
		&cli.StringFlag{Name: "image", Usage: "file of the image, or - for standard input"},
		&cli.StringFlag{Name: "work-path", Usage: "directory for logs"},
		&cli.StringFlag{Name: "bundle", Aliases: []string{"b"}, Value: ".", Usage: "bundle of the new container"},
		&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "do not wait for the container"},
		&cli.BoolFlag{Name: "leave-frozen", Usage: "leave the container paused: runc resume lets it run"},
		&cli.StringFlag{Name: "pid-file", Usage: "file for the pid of the container's init"},
		&cli.StringFlag{Name: "console-socket", Usage: "unix socket that takes the master of the container's terminal, with --detach"},
		&cli.StringSliceFlag{Name: "fd", Usage: "`KEY=N`: what the image has left out under KEY is descriptor N of this process"},
		&cli.StringFlag{Name: "file-validation", Value: runtime.FileValidations[0], Usage: "how far files must be as they were: " + strings.Join(runtime.FileValidations, ", ")},
		&cli.StringFlag{Name: "rootfs-diff", Value: runtime.RootfsDiffs[0], Usage: "what the image has changed in the root file system: " + strings.Join(runtime.RootfsDiffs, ", ")},
		&cli.BoolFlag{Name: "ext-unix-sk", Usage: "accepted; the image says what becomes of unix sockets with peers outside"},
		&cli.BoolFlag{Name: "tcp-established", Usage: "accepted; the image says whether connections of TCP are kept"},
		&cli.BoolFlag{Name: "tcp-close", Usage: "restore connections of TCP as reset by their peers"},
		&cli.StringSliceFlag{Name: "address-map", Usage: "`OLD=NEW`: give sockets with the one local address the other"},
		&cli.BoolFlag{Name: "no-pivot", Usage: "do not use pivot_root (the root is a ramdisk)"},
		&cli.BoolFlag{Name: "no-new-keyring", Usage: "do not make a session keyring for the container"},
		emptyNamespaces,
	},
	Action: restore,
}

func restore(c *cli.Context) error {
	id, err := oneArgument(c, "the new container's id")
	if err != nil {
		return err
	}
	log, err := logger(c)
	if err != nil {
		return err
	}
	in, err := imageIn(c)
	if err != nil {
		return err
	}
	defer in.Close()
	if v := c.String("file-validation"); !slices.Contains(runtime.FileValidations, v) {
		return fmt.Errorf("--file-validation %s: it is one of %s", v, strings.Join(runtime.FileValidations, ", "))
	}
	if v := c.String("rootfs-diff"); !slices.Contains(runtime.RootfsDiffs, v) {
		return fmt.Errorf("--rootfs-diff %s: it is one of %s", v, strings.Join(runtime.RootfsDiffs, ", "))
	}
	addresses, err := runtime.ParseAddressMap(c.StringSlice("address-map"))
	if err != nil {
		return err
	}
	given, err := givenFiles(c.StringSlice("fd"))
	if err != nil {
		return err
	}
	o := runtime.RestoreOptions{
		TCPClose: c.Bool("tcp-close"), AddressMap: addresses,
		Given:       given,
		LeaveFrozen: c.Bool("leave-frozen"), FileValidation: c.String("file-validation"), RootfsDiff: c.String("rootfs-diff"),
		ID: id, Image: in, SystemdCgroup: c.Bool("systemd-cgroup"),
		Detach: c.Bool("detach"), NoPivot: c.Bool("no-pivot"), NoNewKeyring: c.Bool("no-new-keyring"), Log: log,
	}
	if o.EmptyNetwork, err = emptyNetwork(c); err != nil {
		return err
	}
	for name, to := range map[string]*string{"root": &o.Root, "bundle": &o.Bundle, "pid-file": &o.PidFile, "console-socket": &o.ConsoleSocket} {
		if *to = c.String(name); *to != "" {
			if *to, err = filepath.Abs(*to); err != nil {
				return err
			}
		}
	}
	// A signal that no step has heeded by the release is the container's.
	signals := make(chan os.Signal, 64)
	if !c.Bool("detach") {
		signal.Notify(signals, forwarded()...)
	}
	r, err := runtime.Restore(c.Context, o)
	if err != nil {
		return err
	}
	logReport(log, "restored", &r.Report)
	if c.Bool("detach") {
		return nil
	}
	return foreground(r, signals)
}

// givenFiles reads what stands behind --fd: KEY=N.
func givenFiles(list []string) (map[string]int, error) {
	out := map[string]int{}
	for _, text := range list {
		key, number, _ := strings.Cut(text, "=")
		n, err := strconv.ParseUint(number, 10, 31)
		if err != nil {
			return nil, fmt.Errorf("--fd %s: it is KEY=N, N being a descriptor of this process", text)
		}
		if _, twice := out[key]; twice {
			return nil, fmt.Errorf("--fd %s: there is one for %s already", text, key)
		}
		out[key] = int(n)
	}
	return out, nil
}

// foreground forwards signals to the container until its init ends, connects its
// terminal with ours if it has one, and exits with its status, as `runc run` does.
func foreground(r *runtime.Restored, signals <-chan os.Signal) error {
	go func() {
		for s := range signals {
			_ = r.Signal(s)
		}
	}()
	done := func() error { return nil }
	if master := r.Terminal(); master != nil {
		var err error
		if done, err = relay(master); err != nil {
			return err
		}
	}
	state, err := r.Wait()
	if err = errors.Join(err, done()); err != nil {
		return err
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case !ok || status.Exited() && status.ExitStatus() == 0:
		return nil
	case status.Signaled():
		return exitStatus(128 + int(status.Signal()))
	}
	return exitStatus(status.ExitStatus())
}

// forwarded lists all signals but those that are about ourselves: SIGCHLD,
// SIGURG, which the Go runtime sends to its own threads, and SIGWINCH, which the
// container's terminal sends when ours has changed its size.
func forwarded() (all []os.Signal) {
	const last = 64
	for s := syscall.Signal(1); s <= last; s++ {
		if s != unix.SIGCHLD && s != unix.SIGURG && s != unix.SIGWINCH {
			all = append(all, s)
		}
	}
	return all
}

// imageIn opens the image to restore from.
func imageIn(c *cli.Context) (io.ReadCloser, error) {
	switch image := c.String("image"); {
	case image != "" && c.IsSet("image-path"):
		return nil, errors.New("--image and --image-path exclude each other")
	case image == "-":
		return stream(c.Context, 0, unix.O_RDONLY), nil
	case image != "":
		return os.Open(image)
	}
	return os.Open(filepath.Join(c.String("image-path"), runtime.ImageFile))
}
