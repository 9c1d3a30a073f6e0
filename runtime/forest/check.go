package forest

import "fmt"

// checkIDs refuses sessions and groups that no kernel shows. The rules are those of setsid(2) and
// setpgid(2), and of pid allocation: a number stays taken while it is a pid, a tid, a group or a session.
func (f *family) checkIDs(reserved []int) error {
	if f.root.Sid != 0 && f.root.Sid != f.root.Pid {
		return &Unreachable{f.root.Pid, fmt.Sprintf("it is the root, but its session %d was made by another process", f.root.Sid)}
	}
	c := idChecker{family: f, foreign: make(map[int]bool), sessions: make(map[int]bool), groupSid: make(map[int]int)}
	for _, id := range reserved {
		c.foreign[id] = f.byPid[id] == nil
	}
	if f.root.Pid != 1 {
		c.foreign[1] = true // the init of the pid namespace, which has no parent in it
	}
	for _, n := range f.nodes {
		c.sessions[n.Sid] = true
	}
	for _, n := range f.nodes {
		if n.Pid == 1 && n != f.root {
			return &Unreachable{1, "the init of a pid namespace has no parent in it"}
		}
		if reason := c.session(n); reason != "" {
			return &Unreachable{n.Pid, reason}
		}
		if reason := c.group(n); reason != "" {
			return &Unreachable{n.Pid, reason}
		}
	}
	return c.founders()
}

type idChecker struct {
	*family
	foreign  map[int]bool // ids of threads and of processes not in the list
	sessions map[int]bool
	groupSid map[int]int // the session each group is in
}

// session says what is wrong with the session of n, if anything.
func (c *idChecker) session(n *node) string {
	leader := c.byPid[n.Sid]
	switch {
	case n.Sid < 0:
		return fmt.Sprintf("session %d is not an id", n.Sid)
	case n.Sid == 0 && c.root.Sid != 0:
		return "its session was made outside the container, and it is not the one of the root"
	case leader != nil && leader.Sid != n.Sid:
		return fmt.Sprintf("its session %d bears the pid of a process that does not lead it", n.Sid)
	case c.foreign[n.Sid]:
		return fmt.Sprintf("the id of its session %d is that of a thread, or of a process outside the tree", n.Sid)
	}
	return ""
}

// group says what is wrong with the process group of n, if anything.
func (c *idChecker) group(n *node) string {
	sid, seen := c.groupSid[n.Pgid]
	c.groupSid[n.Pgid] = n.Sid
	leader := c.byPid[n.Pgid]
	switch {
	case n.Pgid < 0:
		return fmt.Sprintf("process group %d is not an id", n.Pgid)
	case n.Sid == n.Pid && n.Pgid != n.Pid:
		return fmt.Sprintf("it leads a session, but is in process group %d: a session leader cannot change its group", n.Pgid)
	case n.Pgid == 0 && n.Sid != 0:
		return fmt.Sprintf("its process group was made outside the container, but its session %d inside", n.Sid)
	case seen && sid != n.Sid:
		return fmt.Sprintf("its process group %d is in sessions %d and %d", n.Pgid, sid, n.Sid)
	case leader != nil && leader.Sid != n.Sid:
		return fmt.Sprintf("its process group %d bears the pid of a process of session %d, not %d", n.Pgid, leader.Sid, n.Sid)
	case c.sessions[n.Pgid] && n.Pgid != n.Sid:
		return fmt.Sprintf("its process group %d bears the id of another session than its own %d", n.Pgid, n.Sid)
	case c.foreign[n.Pgid]:
		return fmt.Sprintf("the id of its process group %d is that of a thread, or of a process outside the tree", n.Pgid)
	}
	return ""
}

// founders refuses a process in group 0 whose pid is a group: to found one it must have left group 0,
// and no process can name that group to enter it again.
func (c *idChecker) founders() error {
	for _, n := range c.nodes {
		if _, founded := c.groupSid[n.Pid]; founded && n.Pgid == 0 {
			return &Unreachable{n.Pid, "it founded a process group and is back in the one from outside the container"}
		}
	}
	return nil
}
