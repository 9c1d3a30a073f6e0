package forest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// lines shows a plan with all that a step says of namespaces.
func lines(steps []Step) (out []string) {
	for _, s := range steps {
		l := s.String()
		if n := s.Nested; n != nil && s.Op == Fork {
			l += fmt.Sprintf(" ids %v", n.IDs)
			for _, h := range n.Hints {
				l += fmt.Sprintf(" hint %d by %d", h.Next, h.Writer)
			}
			if n.User+n.Space > 0 {
				l += fmt.Sprintf(" new %d %d", n.User, n.Space)
			}
		}
		if s.Op == Setpgid && s.Nested != nil {
			l += fmt.Sprintf(" as %d", s.Nested.Group)
		}
		out = append(out, l)
	}
	return out
}

// The namespaces of these tests: 10 and 20 are user namespaces, 20 in 10; 11 and
// 21 pid namespaces that they own, 31 one of the container's, 12 a uts namespace.
var testNamespaces = []Namespace{
	{ID: 10, Type: "user"}, {ID: 20, Type: "user", Owner: 10},
	{ID: 11, Type: "pid", Owner: 10}, {ID: 21, Type: "pid", Owner: 20, Parent: 11}, {ID: 31, Type: "pid"},
	{ID: 12, Type: "uts", Owner: 10}, {ID: 22, Type: "time"}, {ID: 41, Type: "pid"}, {ID: 51, Type: "net"}, {ID: 52, Type: "net"},
}

func TestNest(t *testing.T) {
	for name, c := range map[string]struct {
		processes []Process
		places    map[int]Place
		want      string
	}{
		"plain": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 5, Sid: 1}}, nil,
			"1: fork 5; 5: setpgid 5",
		},
		"a pid namespace of the container's": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}, {Pid: 6, Ppid: 5, Pgid: 6, Sid: 1}},
			map[int]Place{5: {Children: []int{31}}, 6: {In: []int{31}, IDs: []int{1}}},
			"1: fork 5; 5: fork 6 ids [1 6] new 0 31; 6: setpgid 6 as 1; 5: setns pid 31 of 6",
		},
		"a brother brought in": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}, {Pid: 6, Ppid: 1, Pgid: 1, Sid: 1}},
			map[int]Place{5: {In: []int{31}, IDs: []int{1}}, 6: {In: []int{31}, IDs: []int{4}}},
			"1: fork 5 ids [1 5] new 0 31; 1: setns pid 31 of 5; 1: fork 6 ids [4 6]; 1: setns pid 0 of 1",
		},
		"unshare -U --pid --fork": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}, {Pid: 6, Ppid: 5, Pgid: 1, Sid: 1}, {Pid: 7, Ppid: 6, Pgid: 1, Sid: 1}},
			map[int]Place{
				5: {In: []int{10, 12}, Children: []int{11}},
				6: {In: []int{10, 11, 12}, IDs: []int{1}}, 7: {In: []int{10, 11, 12}, IDs: []int{2}},
			},
			"1: fork 5; 5: fork 2; 2: unshare 10; 5: setns user 10 of 2; 2: exit; " +
				"5: fork 6 ids [1] hint 6 by 1 new 0 11; 6: fork 7 ids [2] hint 7 by 1; " +
				"5: unshare 12; 5: setns pid 11 of 6; 6: setns uts 12 of 5; 7: setns uts 12 of 5",
		},
		"clone into both": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 6, Ppid: 1, Pgid: 1, Sid: 1}, {Pid: 7, Ppid: 6, Pgid: 1, Sid: 1}},
			map[int]Place{6: {In: []int{10, 11}, IDs: []int{1}}, 7: {In: []int{10, 11}, IDs: []int{2}}},
			"1: fork 6 ids [1 6] new 10 11; 6: fork 7 ids [2] hint 7 by 1",
		},
		"a namespace left to others to make": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}, {Pid: 6, Ppid: 1, Pgid: 1, Sid: 1}},
			map[int]Place{5: {In: []int{12}}, 6: {In: []int{10, 12}}},
			"1: fork 5; 1: fork 6; 6: fork 2; 2: unshare 10; 6: setns user 10 of 2; 2: exit; 6: unshare 12; 5: setns uts 12 of 6",
		},
		"clocks for children": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}, {Pid: 6, Ppid: 5, Pgid: 1, Sid: 1}},
			map[int]Place{5: {Children: []int{22}}, 6: {In: []int{22}}},
			"1: fork 5; 5: fork 6; 5: unshare 22; 6: setns time_for_children 22 of 5",
		},
		"no children yet": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}},
			map[int]Place{5: {Children: []int{41}}},
			"1: fork 5; 5: unshare 41",
		},
		"threads apart": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}, {Pid: 6, Ppid: 5, Pgid: 1, Sid: 1}},
			map[int]Place{
				1: {Threads: [][]int{{102}, {103}}, Apart: []Apart{{Thread: 1, In: []int{52}, Children: []int{41}}, {Thread: 2, In: []int{51}}}},
				5: {In: []int{51}, Threads: [][]int{{7}}, Apart: []Apart{{Thread: 1, Children: []int{31}}}}, 6: {In: []int{31}, IDs: []int{1}},
			},
			"1: fork 5; 5: fork 6 ids [1 6] new 0 31; 5: unshare 51; 1: fork 2; 2: unshare 52; " +
				"1: thread 1: setns net 52 of 2; 1: thread 2: setns net 51 of 5; 1: thread 1: unshare 41; " +
				"5: thread 1: setns net 0 of 1; 5: thread 1: setns pid 31 of 6",
		},
		"a thread that could not come back": {
			[]Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}},
			map[int]Place{5: {In: []int{10, 12}, Threads: [][]int{{7}, {8}}, Apart: []Apart{{Thread: 1, In: []int{10}}}}},
			"1: fork 5; 5: fork 2; 2: unshare 10; 5: setns user 10 of 2; 2: exit; " +
				"1: fork 3; 3: setns user 10 of 5; 3: unshare 12; 5: thread 0: setns uts 12 of 3; 5: thread 2: setns uts 12 of 3; 5: thread []; 5: thread []",
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := Grow(c.processes, nil)
			if err != nil {
				t.Fatal(err)
			}
			nested, err := Nest(p, c.processes, Nesting{Namespaces: testNamespaces, Places: c.places})
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(lines(nested.Steps), "; "); got != c.want {
				t.Errorf("the plan is\n%s\nnot\n%s", strings.ReplaceAll(got, "; ", "\n"), strings.ReplaceAll(c.want, "; ", "\n"))
			}
		})
	}
}

func TestCannotNest(t *testing.T) {
	two := []Process{{Pid: 1, Pgid: 1, Sid: 1}, {Pid: 5, Ppid: 1, Pgid: 1, Sid: 1}}
	for want, c := range map[string]struct {
		processes []Process
		places    map[int]Place
	}{
		"not the init":                       {two, map[int]Place{5: {In: []int{31}, IDs: []int{2}}}},
		"not made from that":                 {two, map[int]Place{5: {In: []int{10, 20, 21}, IDs: []int{1, 1}}}},
		"not in the user":                    {two, map[int]Place{5: {In: []int{11}, IDs: []int{1}}}},
		"its thread could not enter the net": {two, map[int]Place{5: {In: []int{10}, Threads: [][]int{{7}}, Apart: []Apart{{Thread: 1, In: []int{10, 51}}}}}},
		"lets no thread enter": {two, map[int]Place{
			5: {Threads: [][]int{{7}}, Apart: []Apart{{Thread: 1, Children: []int{22}}}}, 1: {Children: []int{22}}}},
		"could make its namesp": {two, map[int]Place{5: {In: []int{12}}}},
		"cannot be named": {slices.Concat(two, []Process{{Pid: 6, Ppid: 5, Pgid: 1, Sid: 1}, {Pid: 7, Ppid: 6, Pgid: 5, Sid: 1}}),
			map[int]Place{6: {In: []int{31}, IDs: []int{1}}, 7: {In: []int{31}, IDs: []int{2}}}},
	} {
		t.Run(want, func(t *testing.T) {
			p, err := Grow(c.processes, nil)
			if err != nil {
				t.Fatal(err)
			}
			nested, err := Nest(p, c.processes, Nesting{Namespaces: testNamespaces, Places: c.places})
			var no *Unreachable
			if !errors.As(err, &no) || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, %v", nested, err)
			}
		})
	}
}
