package namespace

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// user is a numbering of ids, and the capabilities that go with it
// (user_namespaces(7)).
var user = kind{
	name: "user", flag: unix.CLONE_NEWUSER,
	read: func(s *Set, n *Namespace) error {
		u := &image.UserNamespace{}
		var ok [3]bool
		u.OwnerUID, ok[0] = inward(s.Maps.UID, n.kin.OwnerUID, 1)
		for i, m := range []struct {
			name  string
			outer []image.IDMap
			to    *[]image.IDMap
		}{{"uid_map", s.Maps.UID, &u.UIDMap}, {"gid_map", s.Maps.GID, &u.GIDMap}} {
			var err error
			if *m.to, ok[i+1], err = readMap(n.pid, m.name, m.outer); err != nil {
				return err
			}
		}
		if !ok[0] || !ok[1] || !ok[2] {
			return fail.Refuse("", "its owner or its maps lie outside the container's user namespace", "")
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/setgroups", n.pid))
		u.Setgroups = strings.TrimSpace(string(b)) == "allow"
		n.Record.User = u
		return err
	},
}

// readMap reads a map in terms of the container's user namespace. The kernel
// shows ids outside as the reader numbers them, that is as the host does.
func readMap(pid int, name string, outer []image.IDMap) (out []image.IDMap, ok bool, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		return nil, false, err
	}
	for line := range strings.Lines(string(b)) {
		var r image.IDMap
		if _, err := fmt.Sscan(line, &r.Container, &r.Host, &r.Size); err != nil {
			return nil, false, fmt.Errorf("%s: %w", name, err)
		}
		if r.Host, ok = inward(outer, r.Host, r.Size); !ok {
			return nil, false, nil
		}
		out = append(out, r)
	}
	return out, true, nil
}

// inward translates a range of ids through a map, from outside to inside. A map
// that is empty is that of no namespace of its own.
func inward(m []image.IDMap, id, size uint32) (uint32, bool) {
	if len(m) == 0 {
		return id, true
	}
	for _, r := range m {
		if id >= r.Host && uint64(id-r.Host)+uint64(size) <= uint64(r.Size) {
			return r.Container + id - r.Host, true
		}
	}
	return 0, false
}
