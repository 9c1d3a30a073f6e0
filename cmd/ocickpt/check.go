package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime"
)

var checkCommand = &cli.Command{
	Name:  "check",
	Usage: "tell what this host can do",
	Description: `Tries every kernel feature that is used, looks at the capabilities, and then
checkpoints and restores a small container of its own, of which nothing is left
afterwards. The exit status is 1 if something required is missing or the
container did not survive.`,
	Flags: []cli.Flag{
		&cli.BoolFlag{Name: "json", Usage: "print JSON instead of text"},
	},
	Action: check,
}

// hostReport is what check has to tell.
type hostReport struct {
	Kernel       string         `json:"kernel"` // release, as uname -r
	Machine      string         `json:"machine"`
	Features     []abilityEntry `json:"features"`
	Capabilities []abilityEntry `json:"capabilities"`
	Proof        proofEntry     `json:"proof"`
	Works        bool           `json:"works"`
}

type abilityEntry struct {
	Name     string `json:"name"`
	Since    string `json:"since,omitempty"` // Linux version
	Required bool   `json:"required"`
	Works    bool   `json:"works"`
	Error    string `json:"error,omitempty"`
	Errno    string `json:"errno,omitempty"` // "EPERM", where that is the cause
	Without  string `json:"without"`
}

type proofEntry struct {
	Works      bool    `json:"works"`
	Error      string  `json:"error,omitempty"`
	Checkpoint float64 `json:"checkpoint_ms,omitempty"` // wall time
	Stopped    float64 `json:"stopped_ms,omitempty"`    // from the freeze to the end
	Restore    float64 `json:"restore_ms,omitempty"`    // wall time
}

func check(c *cli.Context) error {
	if c.NArg() != 0 {
		return fmt.Errorf("check takes no arguments; got %d", c.NArg())
	}
	log, err := logger(c)
	if err != nil {
		return err
	}
	report, err := examine(c, log)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		encoder := json.NewEncoder(c.App.Writer)
		encoder.SetIndent("", "  ")
		err = encoder.Encode(report)
	} else {
		err = report.print(c.App.Writer)
	}
	return errors.Join(err, report.verdict())
}

// examine tries everything out.
func examine(c *cli.Context, log *slog.Logger) (*hostReport, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	capabilities, err := runtime.CapabilityProbes()
	if err != nil {
		return nil, err
	}
	r := &hostReport{
		Kernel: unix.ByteSliceToString(u.Release[:]), Machine: unix.ByteSliceToString(u.Machine[:]),
		Features: abilityEntries(runtime.Probes()), Capabilities: abilityEntries(capabilities),
	}
	proof, err := runtime.Prove(c.Context, log)
	if err != nil {
		r.Proof.Error = oneLine(err)
	} else {
		r.Proof = proofEntry{
			Works: true, Checkpoint: 1e3 * proof.Checkpoint.Wall.Seconds(),
			Stopped: 1e3 * proof.Checkpoint.Stopped.Seconds(), Restore: 1e3 * proof.Restore.Wall.Seconds(),
		}
	}
	r.Works = r.Proof.Works && len(r.missing()) == 0
	return r, nil
}

func abilityEntries(results []runtime.ProbeResult) []abilityEntry {
	entries := make([]abilityEntry, 0, len(results))
	for _, p := range results {
		e := abilityEntry{Name: p.Name, Since: p.Since, Required: p.Required, Works: p.Err == nil, Without: p.Without}
		if p.Err != nil {
			e.Error = oneLine(p.Err)
		}
		var errno unix.Errno
		if errors.As(p.Err, &errno) {
			e.Errno = unix.ErrnoName(errno)
		}
		entries = append(entries, e)
	}
	return entries
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// missing names what is required and does not work.
func (r *hostReport) missing() (names []string) {
	for _, list := range [][]abilityEntry{r.Features, r.Capabilities} {
		for _, e := range list {
			if e.Required && !e.Works {
				names = append(names, e.Name)
			}
		}
	}
	return names
}

// verdict is the error to exit with.
func (r *hostReport) verdict() error {
	switch names := r.missing(); {
	case r.Works:
		return nil
	case len(names) > 0 && !r.Proof.Works:
		return fmt.Errorf("missing: %s; the proof failed: %s", strings.Join(names, ", "), r.Proof.Error)
	case len(names) > 0:
		return fmt.Errorf("missing: %s", strings.Join(names, ", "))
	}
	return fmt.Errorf("the proof failed: %s", r.Proof.Error)
}

// print writes the report as tables for people.
func (r *hostReport) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "Linux %s on %s\n\n", r.Kernel, r.Machine)
	fmt.Fprintln(t, "FEATURE\tSTATE\tLINUX\tWITHOUT IT")
	for _, e := range r.Features {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", e.Name, e.state("works"), e.Since, e.Without)
	}
	// A line without cells ends a table, so that each has its own widths.
	fmt.Fprintln(t, "\nCAPABILITY\tSTATE\tWITHOUT IT")
	for _, e := range r.Capabilities {
		fmt.Fprintf(t, "%s\t%s\t%s\n", e.Name, e.state("held"), e.Without)
	}
	if r.Proof.Works {
		fmt.Fprintf(t, "\nproof: a container was checkpointed in %.1f ms (stopped for %.1f) and restored in %.1f ms\n",
			r.Proof.Checkpoint, r.Proof.Stopped, r.Proof.Restore)
	} else {
		fmt.Fprintf(t, "\nproof: failed: %s\n", r.Proof.Error)
	}
	return t.Flush()
}

// state says "missing" and why, or what there is instead.
func (e *abilityEntry) state(good string) string {
	if e.Works {
		return good
	}
	state := "missing"
	if e.Errno != "" {
		state += " (" + e.Errno + ")"
	}
	if e.Required {
		state += ", required"
	}
	return state
}
