package runtime

import (
	"testing"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// TestCheckThreads: a checkpoint refuses threads that a restore could not make.
func TestCheckThreads(t *testing.T) {
	var f [3]*file.Table
	var fs [3]*object.Object
	for i := range f {
		f[i], fs[i] = &file.Table{}, &object.Object{}
	}
	const pid = 100
	for _, test := range []struct {
		name   string
		tables []*file.Table
		places []*object.Object
		undo   []int
		ok     bool
	}{
		{"one table for all", []*file.Table{f[0], nil, nil}, []*object.Object{fs[0], nil, nil}, []int{0, 0, 0}, true},
		{"a pair beside the process", []*file.Table{f[0], f[1], f[1]}, []*object.Object{fs[0], nil, fs[1]}, []int{0, 0, 0}, true},
		// The last three share crosswise, and nobody has all that one of them has.
		{"crosswise", []*file.Table{f[0], f[1], f[1], f[2]}, []*object.Object{fs[0], fs[1], fs[2], fs[1]}, []int{1, 3, 2, 2}, false},
	} {
		p := &process{pid: pid, tables: test.tables, places: test.places, state: &task.State{Task: &image.Task{}}}
		n := &census{sharing: sharing{undo: map[int]int{}}, found: found{undo: map[int]uint32{}}}
		for i := range test.tables {
			p.tids = append(p.tids, pid+i)
			p.state.Task.Threads = append(p.state.Task.Threads, image.Thread{Tid: int32(1 + i)})
			n.sharing.undo[pid+i] = test.undo[i]
		}
		if err := n.checkThreads(p); (err == nil) != test.ok {
			t.Errorf("%s: %v", test.name, err)
		}
		if th := p.state.Task.Threads[1]; th.Files != 0 || th.FS != 0 {
			t.Errorf("%s: the record has numbers %+v that mean nothing yet", test.name, th)
		}
	}
}
