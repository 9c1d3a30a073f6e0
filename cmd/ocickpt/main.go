// Ocickpt checkpoints a running OCI container into one stream and restores it,
// here or elsewhere, with the same pids.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	goruntime "runtime"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime"
	"github.com/ocickpt/ocickpt/runtime/guardian"
)

// This program is also what it starts: the init of a container until the stub
// takes its place, and the guardian. Both must begin before anything else does.
func init() {
	// libcontainer has threads that enter the container's mount namespace, and
	// the Go runtime ends such a thread unless it is the main one. Kept for the
	// main goroutine, that one is never it, and /proc/self stays ours.
	goruntime.LockOSThread()
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case "init":
		libcontainer.Init()
	case guardian.Verb:
		guardian.Main()
	}
}

func main() {
	app := &cli.App{
		Name:            "ocickpt",
		Usage:           "checkpoint and restore OCI containers",
		Version:         strings.TrimPrefix(runtime.Version, "ocickpt "),
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Value: "/run/runc", Usage: "state root of the container runtime"},
			&cli.StringFlag{Name: "log", Usage: "file for diagnostics (default: standard error)"},
			&cli.IntFlag{Name: "log-fd", Value: -1, Usage: "descriptor for diagnostics"},
			&cli.StringFlag{Name: "log-format", Value: "text", Usage: "`text` or json"},
			&cli.BoolFlag{Name: "debug", Usage: "log what takes how long"},
			&cli.BoolFlag{Name: "systemd-cgroup", Usage: "let systemd manage the restored container's cgroup"},
		},
		Commands: []*cli.Command{checkpointCommand, restoreCommand, inspectCommand, verifyCommand, checkCommand, manifestCommand},
		// Errors are printed once, below.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   func(_ *cli.Context, err error, _ bool) error { return err },
	}
	// SIGTERM and the like end a journey at its next step, which puts the
	// container back.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	// A reader of the image that goes away is an error like any other. Ignoring
	// the signal would do, but is inherited by every program we start.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	for _, c := range app.Commands { // not inherited
		c.OnUsageError = app.OnUsageError
	}
	err := app.RunContext(ctx, os.Args)
	stop()
	os.Exit(report(err))
}

// exitStatus is an error that only carries the status to exit with.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// report prints an error as one line and returns the status to exit with.
func report(err error) int {
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	line := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
	fmt.Fprintln(os.Stderr, "ocickpt:", line)
	if lastLog != nil {
		lastLog.Error(line)
	}
	return 1
}

// lastLog is the log file, if there is one: errors go there too, because
// engines look for them in it.
var lastLog *slog.Logger

// logger makes the logger that the global flags describe.
func logger(c *cli.Context) (*slog.Logger, error) {
	var w io.Writer = os.Stderr
	toFile := true
	switch {
	case c.IsSet("log"):
		f, err := os.OpenFile(c.String("log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("log: %w", err)
		}
		w = f
	case c.Int("log-fd") >= 0:
		w = os.NewFile(uintptr(c.Int("log-fd")), "log")
	default:
		toFile = false
	}
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if c.Bool("debug") {
		options.Level = slog.LevelDebug
	}
	var h slog.Handler
	switch format := c.String("log-format"); format {
	case "text":
		h = slog.NewTextHandler(w, options)
	case "json":
		// The keys that engines read in runc's logs.
		options.ReplaceAttr = func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.LevelKey {
				a.Value = slog.StringValue(strings.ToLower(a.Value.String()))
			}
			return a
		}
		h = slog.NewJSONHandler(w, options)
	default:
		return nil, fmt.Errorf("log format %q: want text or json", format)
	}
	log := slog.New(h)
	if toFile {
		lastLog = log
	}
	return log, nil
}

// oneArgument is the single argument of a command, which help calls name.
func oneArgument(c *cli.Context, name string) (string, error) {
	if c.NArg() != 1 || c.Args().First() == "" {
		return "", fmt.Errorf("%s takes one argument, %s; got %d", c.Command.Name, name, c.NArg())
	}
	return c.Args().First(), nil
}

func logReport(log *slog.Logger, what string, r *runtime.Report) {
	for _, p := range r.Phases {
		log.Debug("phase", "name", p.Name, "took", p.Took)
	}
	log.Debug(what, "image", r.ID, "bytes", r.Bytes, "tasks", r.Tasks, "threads", r.Threads, "stopped", r.Stopped, "wall", r.Wall)
}
