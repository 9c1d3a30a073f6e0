package runtime

import (
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
)

func bundle(uid uint32, noNewPrivs bool, caps ...string) *specs.Spec {
	return &specs.Spec{Process: &specs.Process{
		User: specs.User{UID: uid, GID: uid, AdditionalGids: []uint32{4}}, NoNewPrivileges: noNewPrivs,
		Capabilities: &specs.LinuxCapabilities{Bounding: caps},
	}}
}

// An image grants nothing that the bundle does not.
func TestGrants(t *testing.T) {
	const chown, kill, setuid, setgid = 1 << unix.CAP_CHOWN, 1 << unix.CAP_KILL, 1 << unix.CAP_SETUID, 1 << unix.CAP_SETGID
	user := func(uid uint32, groups ...uint32) image.Credentials {
		return image.Credentials{UID: [4]uint32{uid, uid, uid, uid}, GID: [4]uint32{uid, uid, uid, uid}, Groups: groups, NoNewPrivs: true}
	}
	with := func(c image.Credentials, change func(*image.Credentials)) image.Credentials { change(&c); return c }
	plain, strict := bundle(33, false, "CAP_CHOWN", "cap_kill"), bundle(33, true, "CAP_CHOWN")
	for name, c := range map[string]struct {
		spec    *specs.Spec
		creds   image.Credentials
		refused string
	}{
		"the bundle's user":              {strict, user(33, 33, 4), ""},
		"fewer groups":                   {strict, user(33), ""},
		"every capability it gives":      {plain, with(user(33), func(c *image.Credentials) { c.Bounding, c.Permitted, c.Ambient = chown|kill, kill, kill }), ""},
		"one more, bounding":             {strict, with(user(33), func(c *image.Credentials) { c.Bounding = chown | kill }), "CAP_KILL"},
		"one more, permitted":            {strict, with(user(33), func(c *image.Credentials) { c.Permitted = kill }), "CAP_KILL"},
		"one more, effective":            {strict, with(user(33), func(c *image.Credentials) { c.Effective = kill }), "CAP_KILL"},
		"one more, inheritable":          {strict, with(user(33), func(c *image.Credentials) { c.Inheritable = kill }), "CAP_KILL"},
		"one more, ambient":              {strict, with(user(33), func(c *image.Credentials) { c.Ambient = kill }), "CAP_KILL"},
		"one that has no name":           {strict, with(user(33), func(c *image.Credentials) { c.Bounding = 1 << 63 }), "capabilities"},
		"another user":                   {strict, user(0), "uid 0"},
		"another saved user":             {strict, with(user(33), func(c *image.Credentials) { c.UID[2] = 0 }), "uid 0"},
		"another file system user":       {strict, with(user(33), func(c *image.Credentials) { c.UID[3] = 0 }), "uid 0"},
		"another group":                  {strict, with(user(33), func(c *image.Credentials) { c.GID[1] = 0 }), "gid 0"},
		"another supplementary group":    {strict, user(33, 4, 27), "gid 27"},
		"another user, by set-uid":       {plain, user(0, 27), ""},
		"another user, by CAP_SETUID":    {bundle(33, true, "CAP_SETUID"), with(user(33), func(c *image.Credentials) { c.UID[1] = 7 }), ""},
		"a group, by CAP_SETUID alone":   {bundle(33, true, "CAP_SETUID"), with(user(33), func(c *image.Credentials) { c.GID[1] = 7 }), "gid 7"},
		"a group, by CAP_SETGID":         {bundle(33, true, "CAP_SETGID"), user(33, 7), ""},
		"privileges it may gain":         {strict, with(user(33), func(c *image.Credentials) { c.NoNewPrivs = false }), "gain privileges"},
		"privileges the bundle may gain": {plain, with(user(33), func(c *image.Credentials) { c.NoNewPrivs = false }), ""},
		"a bundle without capabilities":  {&specs.Spec{Process: &specs.Process{User: specs.User{UID: 33, GID: 33}}}, with(user(33), func(c *image.Credentials) { c.Bounding = setuid | setgid }), "CAP_SETGID CAP_SETUID"},
		"the same, with no capabilities": {&specs.Spec{Process: &specs.Process{User: specs.User{UID: 33, GID: 33}}}, user(33), ""},
	} {
		head := &image.Head{Tasks: []*image.Task{{Pid: 1, Threads: []image.Thread{{Tid: 1, Creds: user(33)}, {Tid: 2, Creds: c.creds}}}}}
		g, err := grantsOf(c.spec)
		must(t, err)
		err = g.checkImage(head)
		var refused *fail.Refused
		switch {
		case c.refused == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.refused != "" && (!errors.As(err, &refused) || !strings.Contains(err.Error(), c.refused) || !strings.Contains(err.Error(), "thread 2")):
			t.Errorf("%s: %v, want a refusal that says %q", name, err, c.refused)
		}
	}
}

func TestGrantsOfControls(t *testing.T) {
	filtered := bundle(33, false, "CAP_SYS_RESOURCE")
	filtered.Linux = &specs.Linux{Seccomp: &specs.LinuxSeccomp{}}
	for name, c := range map[string]struct {
		spec    *specs.Spec
		thread  image.Thread
		refused string
	}{
		"an I/O flusher":                    {bundle(33, false), image.Thread{Controls: image.Controls{IOFlusher: true}}, "CAP_SYS_RESOURCE"},
		"an I/O flusher that may be":        {bundle(33, false, "CAP_SYS_RESOURCE"), image.Thread{Controls: image.Controls{IOFlusher: true}}, ""},
		"strict mode":                       {bundle(33, false), image.Thread{SeccompMode: task.SeccompStrict}, ""},
		"strict mode instead of the filter": {filtered, image.Thread{SeccompMode: task.SeccompStrict}, "strict mode"},
	} {
		g, err := grantsOf(c.spec)
		must(t, err)
		c.thread.Creds = image.Credentials{UID: [4]uint32{33, 33, 33, 33}, GID: [4]uint32{33, 33, 33, 33}}
		err = g.check(&c.thread, nil)
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v, want a refusal that says %q", name, err, c.refused)
		}
	}
}

func TestGrantsOfIPC(t *testing.T) {
	segment := func(p image.IPCPerm, locked bool) *image.Shmem {
		return &image.Shmem{Size: 1 << 40, SysV: &image.SysVSegment{Perm: p, Locked: locked}}
	}
	mine := image.IPCPerm{CUID: 33, CGID: 4, UID: 7}
	strict := bundle(33, true)
	strict.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_MEMLOCK", Hard: 1 << 16}}
	for name, c := range map[string]struct {
		spec    *specs.Spec
		object  any
		refused string
	}{
		"given away":                 {strict, &image.SemSet{Perm: mine}, ""},
		"of another creator":         {strict, &image.Messages{Perm: image.IPCPerm{UID: 33, CGID: 33}}, "uid 0 has created it"},
		"of another creator's group": {strict, segment(image.IPCPerm{CUID: 33, CGID: 5}, false), "gid 5 has created it"},
		"of any creator":             {bundle(0, true, "CAP_SETUID", "CAP_SETGID"), segment(mine, false), ""},
		"locked":                     {strict, segment(mine, true), "RLIMIT_MEMLOCK"},
		"locked, as it may be":       {bundle(33, false, "CAP_IPC_LOCK"), segment(mine, true), ""},
		"memory, not an object":      {strict, &image.Shmem{}, ""},
	} {
		g, err := grantsOf(c.spec)
		must(t, err)
		err = g.checkImage(&image.Head{Objects: map[image.Ref]any{1: c.object}})
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v, want a refusal that says %q", name, err, c.refused)
		}
	}
}

func TestGrantsOfLockedMemory(t *testing.T) {
	const size = 1 << 40
	locked := &image.MM{Areas: []image.Area{{Start: 0, End: size, Kind: image.AreaAnon, Flags: []string{"lo"}}}}
	for name, c := range map[string]struct {
		caps  []string
		limit uint64
		ok    bool
	}{"by limit": {nil, size, true}, "by capability": {[]string{"CAP_IPC_LOCK"}, 0, true}, "neither": {nil, size - 1, false}} {
		spec := bundle(0, false, c.caps...)
		spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_MEMLOCK", Hard: c.limit}}
		g, err := grantsOf(spec)
		must(t, err)
		if err := g.checkLocked(locked); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestGrantsOfBundle(t *testing.T) {
	if _, err := grantsOf(bundle(0, false, "CAP_FLY")); err == nil {
		t.Error("an unknown capability was taken")
	}
	for _, change := range []func(*specs.Process){
		func(p *specs.Process) { p.ApparmorProfile = "x" }, func(p *specs.Process) { p.SelinuxLabel = "x" },
	} {
		spec := bundle(0, false)
		change(spec.Process)
		if _, err := grantsOf(spec); err == nil {
			t.Error("confinement was left out")
		}
	}
	numbers := map[uint]string{}
	for name, n := range capabilities {
		if numbers[n] != "" || n > unix.CAP_LAST_CAP {
			t.Errorf("%s and %s are %d", name, numbers[n], n)
		}
		numbers[n] = name
	}
	if len(numbers) != unix.CAP_LAST_CAP+1 || capabilities["CAP_SYS_ADMIN"] != unix.CAP_SYS_ADMIN || capabilities["CAP_BPF"] != unix.CAP_BPF {
		t.Errorf("%d capabilities", len(numbers))
	}
}

// TestNestedGrants holds namespaces that tasks claim to have made against what a
// bundle lets them make.
func TestNestedGrants(t *testing.T) {
	own := []image.IDMap{{Container: 0, Host: 33, Size: 1}}
	user := func(owner uint32, uids, gids []image.IDMap) image.NestedNamespace {
		return image.NestedNamespace{Ref: 9, Type: "user", Owner: 1, User: &image.UserNamespace{OwnerUID: owner, UIDMap: uids, GIDMap: gids}}
	}
	wide := []image.IDMap{{Container: 0, Host: 100000, Size: 65536}}
	plain := grants{uid: 33, gid: 33, groups: []uint32{33}}
	admin := grants{uid: 33, gid: 33, groups: []uint32{33}, capabilities: 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID}
	for name, c := range map[string]struct {
		g       grants
		n       image.NestedNamespace
		refused string
	}{
		"own ids":         {plain, user(33, own, own), ""},
		"no maps":         {plain, user(33, nil, nil), ""},
		"another's owner": {plain, user(0, own, own), "its owner is uid 0"},
		"another's uid":   {plain, user(33, []image.IDMap{{Container: 0, Host: 0, Size: 1}}, own), "CAP_SETUID"},
		"another's gid":   {plain, user(33, own, []image.IDMap{{Container: 0, Host: 0, Size: 1}}), "CAP_SETGID"},
		"two uids":        {plain, user(33, []image.IDMap{{Container: 0, Host: 33, Size: 2}}, own), "CAP_SETUID"},
		"many uids":       {plain, user(33, wide, own), "CAP_SETUID"},
		"granted":         {admin, user(0, wide, wide), ""},
		"uts":             {plain, image.NestedNamespace{Ref: 9, Type: "uts", Owner: 1}, "CAP_SYS_ADMIN"},
		"uts granted":     {admin, image.NestedNamespace{Ref: 9, Type: "uts", Owner: 1}, ""},
		"clocks":          {admin, image.NestedNamespace{Ref: 9, Type: "time", Owner: 1}, "CAP_SYS_TIME"},
	} {
		head := &image.Head{Tree: image.Tree{Namespaces: []image.NestedNamespace{c.n}}}
		err := c.g.checkNested(head)
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v, want a refusal that says %q", name, err, c.refused)
		}
	}
	inside := &image.Thread{Creds: image.Credentials{UID: [4]uint32{33, 33, 33, 33}, GID: [4]uint32{33, 33, 33, 33}, Bounding: ^uint64(0)}}
	n := user(33, own, own)
	if err := plain.check(inside, &n); err != nil {
		t.Errorf("capabilities inside: %v", err)
	}
	if err := plain.check(inside, nil); err == nil {
		t.Error("the same capabilities outside are granted")
	}
}
