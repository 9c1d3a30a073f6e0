package image

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
)

// Listed is one line of a list of all descriptors.
type Listed struct {
	Tasks []int32 `json:"tasks"` // that share the table: pids, or the tid of a thread that has one of its own
	Comm  string  `json:"comm,omitempty"`
	DescriptorSummary
}

// Files lists every descriptor of the image, by task and number. Open files that
// no table has, but that something else holds (a socket they are on their way
// through, an epoll), stand at the end, without a task and with number -1.
func (s *Summary) Files() []Listed {
	comms := map[int32]string{}
	for _, p := range s.Processes {
		for _, t := range p.Threads {
			comms[t.Tid] = t.Comm
		}
	}
	list := []Listed{}
	for _, table := range s.Tables {
		for _, d := range table.Descriptors {
			list = append(list, Listed{table.Pids, comms[table.Pids[0]], d})
		}
	}
	for _, d := range s.Loose {
		list = append(list, Listed{[]int32{}, "", d})
	}
	return list
}

// WriteFiles writes the list of all descriptors for people.
func (s *Summary) WriteFiles(w io.Writer) error {
	b := bufio.NewWriter(w)
	table(b, func(t io.Writer) {
		fmt.Fprintf(t, "TASK\tFD\tKIND\tFLAGS\tPOSITION\tFILE\tREF\tSHARED WITH\n")
		for _, d := range s.Files() {
			task, fd := "-", "-"
			if len(d.Tasks) > 0 {
				task, fd = strings.Trim(strings.ReplaceAll(fmt.Sprint(d.Tasks), " ", ","), "[]")+" "+printable(d.Comm), fmt.Sprint(d.FD)
			}
			shared := "-"
			if len(d.Shared) > 0 {
				shared = strings.Join(d.Shared, " ")
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t#%d\t%s\n", task, fd, printable(d.Kind), d.Flags, d.Pos, printable(d.Target), d.Ref, shared)
		}
	})
	return b.Flush()
}

// WriteFilesJSON writes it for programs.
func (s *Summary) WriteFilesJSON(w io.Writer) error { return writeJSON(w, s.Files()) }

// looseFiles summarizes the open files that are in no table and not mapped.
func looseFiles(h *Head, held map[Ref][]holder) []DescriptorSummary {
	mapped := map[Ref]bool{}
	for _, o := range h.Objects {
		if mm, ok := o.(*MM); ok {
			mapped[mm.Exe] = true
			for i := range mm.Areas {
				mapped[mm.Areas[i].File] = true
			}
		}
	}
	var list []DescriptorSummary
	for ref := range h.Objects {
		if h.File(ref) != nil && held[ref] == nil && !mapped[ref] {
			list = append(list, descriptorSummary(h, Descriptor{FD: -1, File: ref}, -1, nil))
		}
	}
	slices.SortFunc(list, func(a, b DescriptorSummary) int { return int(a.Ref) - int(b.Ref) })
	return list
}

// describe says what there is to say of an open file of a kind that has neither a
// path nor words of its own: its parts, as the record has them.
func describe(f *File) string {
	var words []string
	v := reflect.ValueOf(f).Elem()
	for i := range v.NumField() {
		if part := v.Field(i); part.Kind() == reflect.Pointer && !part.IsNil() && v.Type().Field(i).Name != "Owner" {
			text, err := json.Marshal(part.Interface())
			if err == nil {
				words = append(words, strings.ToLower(v.Type().Field(i).Name)+" "+clip(string(text)))
			}
		}
	}
	if f.Pipe != 0 {
		words = append(words, fmt.Sprintf("#%d", f.Pipe))
	}
	return strings.Join(words, ", ")
}

// clip shortens what a line need not have in full.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
