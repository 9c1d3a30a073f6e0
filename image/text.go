package image

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf16"
)

// WriteText writes the summary for people. Names come from the image and so
// from the container; control characters in them are escaped.
func (s *Summary) WriteText(w io.Writer) error {
	b := bufio.NewWriter(w)
	s.textHeader(b)
	s.textContainer(b)
	s.textTree(b)
	s.textNested(b)
	s.textFiles(b)
	s.textMemory(b)
	s.textSections(b)
	if len(s.External) > 0 {
		fmt.Fprintf(b, "\nLeft out, to be given by --fd KEY=N\n")
		for _, e := range s.External {
			fmt.Fprintf(b, "  %s  %s of task %d\n", printable(e.Key), printable(e.Was), e.Task)
		}
	}
	if len(s.Warnings) > 0 {
		fmt.Fprintf(b, "\nWarnings\n")
		for _, warning := range s.Warnings {
			fmt.Fprintf(b, "  %s\n", printable(warning))
		}
	}
	return b.Flush() // keeps the first error of all the writes before
}

// WriteJSON writes the summary for programs, indented. Characters that a
// terminal could act on are escaped beyond what JSON asks for.
func (s *Summary) WriteJSON(w io.Writer) error { return writeJSON(w, s) }

func writeJSON(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the summary: %w", err)
	}
	b := bufio.NewWriter(w)
	for _, r := range string(text) {
		if r == '\n' || strconv.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(b, "\\u%04x", unit)
		}
	}
	b.WriteByte('\n')
	return b.Flush()
}

// table writes rows of tab-separated cells in aligned columns.
func table(w io.Writer, rows func(t io.Writer)) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	rows(t)
	t.Flush() // an error stays in the bufio.Writer below
}

// field writes one line of a list of named values, unless there is no value.
func field(w io.Writer, name, value string) {
	if value != "" {
		fmt.Fprintf(w, "  %s\t%s\n", name, value)
	}
}

func (s *Summary) textHeader(w io.Writer) {
	fmt.Fprintf(w, "Image %s\n", s.ID)
	table(w, func(t io.Writer) {
		field(t, "taken", s.Time.Format(time.RFC3339Nano)+" by "+printable(s.Tool))
		field(t, "kernel", printable(s.Kernel)+" "+printable(s.Machine))
		field(t, "format", fmt.Sprintf("revision %d", s.Revision))
		field(t, "options", strings.Join(s.Options, ", "))
		field(t, "size", s.Report.String())
		if s.Failure != nil {
			field(t, "FAILED", (&FailedError{Record: Error(*s.Failure)}).Error())
		}
	})
}

func (f *FileSystemSummary) text() string {
	files := count(uint64(f.Inodes), "file")
	if f.Point == RootPoint {
		files += fmt.Sprintf(" changed, %s removed", count(uint64(f.Gone), "name"))
	}
	return fmt.Sprintf("%s: %s, %s", printable(f.Point), files, size(f.Bytes))
}

// String gives the sizes in one line.
func (r *Report) String() string {
	return fmt.Sprintf("%s, %s, %s", count(r.Records, "record"), size(r.Bytes), count(r.Pages, "page"))
}

func (s *Summary) textContainer(w io.Writer) {
	c := &s.Container
	fmt.Fprintf(w, "\nContainer %s\n", printable(c.ID))
	table(w, func(t io.Writer) {
		field(t, "bundle", printable(c.Bundle))
		field(t, "runtime", printable(c.Runtime))
		field(t, "hostname", printable(c.Hostname))
		if c.Paused {
			field(t, "paused", "by its engine, before the checkpoint")
		}
		for i, ns := range s.Namespaces {
			name := ""
			if i == 0 {
				name = "namespaces"
			}
			fmt.Fprintf(t, "  %s\t%s\n", name, namespaceText(ns))
		}
		for _, fs := range c.FileSystems {
			field(t, "file system", fs.text())
		}
		for _, controller := range slices.Sorted(maps.Keys(c.Cgroups)) {
			field(t, "cgroup", strings.TrimSpace(printable(controller)+" "+printable(c.Cgroups[controller])))
		}
		if c.Subs > 0 {
			field(t, "cgroups below", fmt.Sprint(c.Subs))
		}
		field(t, "mounts", fmt.Sprint(c.Mounts))
		for _, link := range c.Links {
			field(t, "network", printable(link))
		}
	})
}

func namespaceText(ns NamespaceSummary) string {
	s := fmt.Sprintf("%-6s  %d", printable(ns.Type), ns.Inode)
	if ns.Path != "" {
		s += "  joined at " + printable(ns.Path)
	}
	if ns.Host {
		s += "  of the host"
	}
	return s
}

func (s *Summary) textTree(w io.Writer) {
	threads, zombies := 0, 0
	children := map[int32][]*ProcessSummary{}
	for i := range s.Processes {
		p := &s.Processes[i]
		threads += len(p.Threads)
		if strings.HasPrefix(p.State, "zombie") {
			zombies++
		}
		children[p.Ppid] = append(children[p.Ppid], p)
	}
	fmt.Fprintf(w, "\nTasks: %s, %s, %s\n", plural(len(s.Processes), "process", "processes"),
		count(uint64(threads), "thread"), count(uint64(zombies), "zombie"))
	table(w, func(t io.Writer) {
		fmt.Fprintf(t, "  PROCESS\tHOST PID\tPGID\tSID\tTHREADS\tSTATE\n")
		drawTree(t, children)
	})
}

// twig is a process that waits to be drawn.
type twig struct {
	*ProcessSummary
	indent string
	depth  int
	last   bool // of its siblings
}

// drawTree draws the processes below pid 0 with a stack of its own: an image
// may hold a chain of as many processes as there are pids.
func drawTree(w io.Writer, children map[int32][]*ProcessSummary) {
	stack := twigs(nil, children[0], "  ", 0)
	for len(stack) > 0 {
		p := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		line, indent := p.lines()
		fmt.Fprintf(w, "%s%d %s\t%d\t%d\t%d\t%s\t%s\n", p.indent+line, p.Pid, printable(p.Comm),
			p.HostPid, p.Pgid, p.Sid, threadsText(p.ProcessSummary), stateText(p.ProcessSummary))
		stack = twigs(stack, children[p.Pid], indent, p.depth+1)
	}
}

// twigs pushes siblings so that the first is drawn first.
func twigs(stack []twig, list []*ProcessSummary, indent string, depth int) []twig {
	for i, p := range slices.Backward(list) {
		stack = append(stack, twig{p, indent, depth, i == len(list)-1})
	}
	return stack
}

// lines returns what connects a process to its parent, and the indentation of
// its children, which stops growing where no screen is wide enough.
func (t *twig) lines() (line, indent string) {
	const deepest = 24
	switch {
	case t.depth == 0:
		return "", t.indent
	case t.depth >= deepest:
		return "└─ ", t.indent
	case t.last:
		return "└─ ", t.indent + "   "
	}
	return "├─ ", t.indent + "│  "
}

// stateText is a process's state, and where it is that init is not.
func stateText(p *ProcessSummary) string {
	if len(p.Namespaces) == 0 {
		return p.State
	}
	return p.State + "; " + strings.Join(p.Namespaces, ", ")
}

// textNested lists the namespaces that tasks have made.
func (s *Summary) textNested(w io.Writer) {
	if len(s.Nested) == 0 {
		return
	}
	fmt.Fprintf(w, "\nNamespaces made by tasks: %d\n", len(s.Nested))
	table(w, func(t io.Writer) {
		fmt.Fprintf(t, "  REF\tTYPE\tOWNER\tPARENT\tHOLDS\n")
		for _, n := range s.Nested {
			parent := "-"
			if n.Parent != 0 {
				parent = fmt.Sprintf("#%d", n.Parent)
			}
			fmt.Fprintf(t, "  #%d\t%s\t#%d\t%s\t%s\n", n.Ref, n.Type, n.Owner, parent, printable(n.Holds))
		}
	})
}

// threadsText counts a process's threads and names those that call themselves
// otherwise than their process.
func threadsText(p *ProcessSummary) string {
	const most = 8
	if len(p.Threads) == 0 {
		return "-"
	}
	s := fmt.Sprint(len(p.Threads))
	named := 0
	for _, t := range p.Threads {
		if t.Tid == p.Pid || t.Comm == p.Comm {
			continue
		}
		if named++; named > most {
			return s + " ..."
		}
		s += fmt.Sprintf(" %d:%s", t.Tid, printable(t.Comm))
	}
	return s
}

// pidsText names the processes that share an object.
func (s *Summary) pidsText(pids []int32) string {
	const most = 16
	comms := map[int32]string{}
	for _, p := range s.Processes {
		comms[p.Pid] = p.Comm
	}
	var words []string
	for i, pid := range pids {
		if i == most {
			words = append(words, fmt.Sprintf("and %d more", len(pids)-most))
			break
		}
		words = append(words, fmt.Sprintf("%d %s", pid, printable(comms[pid])))
	}
	return strings.Join(words, ", ")
}

func (s *Summary) textFiles(w io.Writer) {
	if len(s.Tables) > 0 {
		fmt.Fprintf(w, "\nOpen files\n")
	}
	for _, tab := range s.Tables {
		fmt.Fprintf(w, "  %s\n", s.pidsText(tab.Pids))
		table(w, func(t io.Writer) {
			for _, d := range tab.Descriptors {
				fmt.Fprintf(t, "    %d\t%s\t%s\t%s", d.FD, d.Kind, d.Flags, printable(d.Target))
				if d.Pos != 0 {
					fmt.Fprintf(t, " at %d", d.Pos)
				}
				if len(d.Shared) > 0 {
					fmt.Fprintf(t, ", shared with %s", strings.Join(d.Shared, " "))
				}
				fmt.Fprintln(t)
			}
		})
	}
}

func (s *Summary) textMemory(w io.Writer) {
	if len(s.Memory) > 0 {
		fmt.Fprintf(w, "\nMemory\n")
	}
	for _, m := range s.Memory {
		fmt.Fprintf(w, "  %s\n", s.pidsText(m.Pids))
		table(w, func(t io.Writer) {
			for _, k := range append(slices.Clone(m.Kinds), m.Total) {
				kind := k.Kind
				if kind == "" {
					kind = "total"
				}
				fmt.Fprintf(t, "    %s\t%s\t%s mapped\t%s stored\n", kind, count(uint64(k.Areas), "area"), size(k.Mapped), size(k.Stored))
			}
		})
	}
	if len(s.Shared) == 0 {
		return
	}
	fmt.Fprintf(w, "  shared memory\n")
	table(w, func(t io.Writer) {
		for _, m := range s.Shared {
			fmt.Fprintf(t, "    #%d\t%s\t%s\t%s stored\n", m.Ref, printable(m.Name), size(m.Size), size(m.Stored))
		}
	})
}

func (s *Summary) textSections(w io.Writer) {
	fmt.Fprintf(w, "\nSections\n")
	last := ""
	table(w, func(t io.Writer) {
		for _, sec := range s.Sections {
			name := sec.Section
			if name == last {
				name = ""
			}
			last = sec.Section
			fmt.Fprintf(t, "  %s\t%s\t%s\t%s\n", name, sec.Record, count(sec.Records, "record"), size(sec.Bytes))
		}
	})
}

// count gives a number of things that form their plural with s.
func count(n uint64, thing string) string { return plural(n, thing, thing+"s") }

func plural[N int | uint64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// size gives a number of bytes in the unit people would choose.
func size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	for v >= 1024 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[unit])
}
