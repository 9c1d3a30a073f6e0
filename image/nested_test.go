package image

import (
	"bytes"
	"strings"
	"testing"
)

// nestedSample is a process that has made a user, a uts and a pid namespace, and
// its child, the init of the latter, with one of its own that it has left
// empty. The container has the references 1 and 2.
func nestedSample() (Container, Tree) {
	c := sampleContainer()
	c.Mounts = []Mount{{ID: 1, Root: "/x", Point: "/"}}
	c.Namespaces = []Namespace{{Ref: 1, Type: "user", Inode: 1}, {Ref: 2, Type: "pid", Inode: 2}}
	zombie := func(pid, ppid int32) Process {
		return Process{Pid: pid, Ppid: ppid, Pgid: 1, Sid: 1, Pids: []int32{4000 + pid, pid}, Zombie: true}
	}
	t := Tree{
		Processes: []Process{zombie(1, 0), zombie(7, 1), zombie(8, 7)},
		Namespaces: []NestedNamespace{
			{Ref: 3, Type: "user", Inode: 3, Owner: 1, User: &UserNamespace{OwnerUID: 1000, UIDMap: []IDMap{{0, 1000, 1}}, GIDMap: []IDMap{{0, 1000, 1}}}},
			{Ref: 4, Type: "uts", Inode: 4, Owner: 3, UTS: &UTSNamespace{Hostname: "inner\x1b[2J"}},
			{Ref: 5, Type: "pid", Inode: 5, Owner: 3, Parent: 2},
			{Ref: 6, Type: "pid", Owner: 3, Parent: 5},
			{Ref: 7, Type: "mnt", Owner: 3, Mounts: []Mount{
				{ID: 11, Parent: 9, Root: "/", Point: "/", Own: MountCopy, From: 1},
				{ID: 12, Parent: 11, Root: "/", Point: "/t", FSType: "tmpfs", Own: MountNew},
				{ID: 13, Parent: 12, Root: "/a", Point: "/t/b", FSType: "tmpfs", Own: MountBind, From: 12},
				{ID: 14, Parent: 11, Root: "/", Point: "/proc", FSType: "proc", Own: MountNew, Space: 5},
			}},
			{Ref: 8, Type: "pid", Owner: 1, Parent: 2},
		},
	}
	t.Processes[1].Namespaces, t.Processes[1].Children = []Ref{3, 4}, []Ref{5}
	t.Processes[2].Namespaces, t.Processes[2].Children = []Ref{3, 4, 5}, []Ref{6}
	t.Processes[2].Inner = &InnerIDs{Threads: [][]int32{{1}}, Pgid: []int32{0}, Sid: []int32{0}}
	return c, t
}

func nestedImage(t *testing.T, c Container, tree Tree) []byte {
	f := newForge()
	f.head(t, 2)
	f.any(t, TypeContainer, 0, c)
	f.any(t, TypeTree, 0, tree)
	f.any(t, TypeTrailer, 0, f.tally.trailer())
	return f.image()
}

func TestNested(t *testing.T) {
	c, tree := nestedSample()
	s, err := Inspect(bytes.NewReader(nestedImage(t, c, tree)))
	check(t, err)
	var text strings.Builder
	check(t, s.WriteText(&text))
	for _, want := range []string{"user #3, uts #4, pid #5 as 1, children in pid #6", "of uid 1000, uids [0=1000+1]", `inner\x1b[2J`, "#5   pid   #3     #2"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("inspect does not show %q:\n%s", want, text.String())
		}
	}
}

func TestBadNesting(t *testing.T) {
	for want, damage := range map[string]func(tree *Tree){
		"does not ascend":             func(tree *Tree) { tree.Namespaces[0].Ref = 2 },
		"thread 2: reference 2 names": func(tree *Tree) { tree.Processes[0].Apart[0].Children[0] = 2 },
		"no thread 7, or two":         func(tree *Tree) { tree.Processes[0].Apart[0].Tid = 7 },
		"or two of them": func(tree *Tree) {
			tree.Processes[0].Apart = append(tree.Processes[0].Apart, tree.Processes[0].Apart[0])
		},
		"thread 2 is in another pid":         func(tree *Tree) { tree.Processes[0].Apart[0].Namespaces = []Ref{8} },
		"reference 5 of a nested":            func(tree *Tree) { tree.Namespaces[3].Ref = 5 },
		"no type of namespace":               func(tree *Tree) { tree.Namespaces[1].Type = "dream" },
		"owner 9 is no user namespace":       func(tree *Tree) { tree.Namespaces[1].Owner = 9 },
		"owner 2 is no user namespace":       func(tree *Tree) { tree.Namespaces[1].Owner = 2 },
		"owner 3 is no user namespace":       func(tree *Tree) { tree.Namespaces[0].Owner = 3 },
		"parent 6 is no pid namespace":       func(tree *Tree) { tree.Namespaces[3].Parent = 6 },
		"parent 0 is no pid namespace":       func(tree *Tree) { tree.Namespaces[3].Parent = 0 },
		"only a pid namespace has a parent":  func(tree *Tree) { tree.Namespaces[1].Parent = 2 },
		"only a pid namespace has":           func(tree *Tree) { tree.Namespaces[0].Dead = true },
		"not what its type has":              func(tree *Tree) { tree.Namespaces[1].UTS = nil },
		"longer than 64 bytes":               func(tree *Tree) { tree.Namespaces[1].UTS.Domainname = strings.Repeat("x", 65) },
		"a map of 0 ids":                     func(tree *Tree) { tree.Namespaces[0].User.UIDMap[0].Size = 0 },
		"ids from 4294967295":                func(tree *Tree) { tree.Namespaces[0].User.GIDMap[0].Container = ^uint32(0) },
		"a map of 341 ranges":                func(tree *Tree) { tree.Namespaces[0].User.GIDMap = make([]IDMap, 341) },
		"names no nested namespace":          func(tree *Tree) { tree.Processes[1].Namespaces[0] = 1 },
		"of a type that it is in already":    func(tree *Tree) { tree.Processes[2].Namespaces = []Ref{3, 5, 6} },
		"children can begin in":              func(tree *Tree) { tree.Processes[1].Children[0] = 4 },
		"do not fit these":                   func(tree *Tree) { tree.Processes[1].Inner = &InnerIDs{} },
		"ids in nested pid namespaces do no": func(tree *Tree) { tree.Processes[2].Inner = nil },
		"too few or too many":                func(tree *Tree) { tree.Processes[2].Inner.Threads[0] = []int32{1, 1} },
		"are too few":                        func(tree *Tree) { tree.Processes[2].Inner.Sid = nil },
		"nested pid namespaces are too few":  func(tree *Tree) { tree.Processes[2].Inner.Threads = nil },
		"its group or session is negative":   func(tree *Tree) { tree.Processes[2].Inner.Pgid[0] = -1 },
		"not positive or used twice":         func(tree *Tree) { tree.Processes[2].Inner.Threads[0][0] = 0 },
		"has processes and no init":          func(tree *Tree) { tree.Processes[2].Inner.Threads[0][0] = 2 },
		"namespaces are more than":           func(tree *Tree) { tree.Namespaces = make([]NestedNamespace, maxNested+1) },
		"in the unknown way":                 func(tree *Tree) { tree.Namespaces[4].Mounts[1].Own = "move" },
		"made in no way":                     func(tree *Tree) { tree.Namespaces[4].Mounts[1].Own = "" },
		"its point is no path":               func(tree *Tree) { tree.Namespaces[4].Mounts[1].Point = "t" },
		"copy of nothing":                    func(tree *Tree) { tree.Namespaces[4].Mounts[0].From = 2 },
		"on which it stands":                 func(tree *Tree) { tree.Namespaces[4].Mounts[3].Parent = 1 },
		"\"tmpfs\" mount of pid namespace":   func(tree *Tree) { tree.Namespaces[4].Mounts[1].Space = 5 },
		"mount of pid namespace 2":           func(tree *Tree) { tree.Namespaces[4].Mounts[3].Space = 2 },
		"mount 1 stands twice":               func(tree *Tree) { tree.Namespaces[4].Mounts[3].ID = 1 },
		"several roots": func(tree *Tree) {
			m := tree.Namespaces[4].Mounts
			m[1].Point, m[1].Parent, m[3].Point, m[3].Parent = "/", 0, "/", 0
		},
		"it is 33 deep": func(tree *Tree) {
			tree.Namespaces = tree.Namespaces[:5]
			tree.Namespaces[4] = NestedNamespace{Ref: 7, Type: "pid", Owner: 3, Parent: 6}
			for i := range 33 {
				tree.Namespaces = append(tree.Namespaces, NestedNamespace{Ref: Ref(8 + i), Type: "pid", Owner: 3, Parent: Ref(7 + i)})
			}
		},
	} {
		t.Run(want, func(t *testing.T) {
			c, tree := nestedSample()
			first := &tree.Processes[0]
			first.Zombie, first.Threads, first.Apart = false, []int32{1, 2}, []ApartThread{{Tid: 2, Children: []Ref{8}}}
			damage(&tree)
			refused(t, nestedImage(t, c, tree), want)
		})
	}
}
