package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Queue is what a POSIX message queue holds. No system call shows a message
// without taking it out, nor all of what was registered with mq_notify(2).
type Queue struct {
	Messages []QueueMessage // in the order in which they will be received
	Creator  uint32         // uid on the host of the user whose limit it counts against
	// Owner is the process, on the host, that is to be told of a message, or 0.
	Owner  int
	Method int32 // SIGEV_* of sigevent(3type)
	Signal int32
	Value  uint64
}

// QueueMessage is one message.
type QueueMessage struct {
	Priority uint32
	Text     []byte
}

// Queues asks for the contents of POSIX message queues (ipc/mqueue.c).
type Queues struct {
	m  *memory
	at map[string]int32
}

// NewQueues loads the question.
func NewQueues() (*Queues, error) {
	m, err := newMemory()
	if err != nil {
		return nil, err
	}
	q := &Queues{m: m}
	q.at, err = m.offsets(map[string][]string{
		"inode": {"mqueue_inode_info", "vfs_inode"}, "tree": {"mqueue_inode_info", "msg_tree", "rb_node"},
		"user": {"mqueue_inode_info", "ucounts"}, "uid": {"ucounts", "uid"},
		"count": {"mqueue_inode_info", "attr", "mq_curmsgs"},
		"owner": {"mqueue_inode_info", "notify_owner"}, "numbers": {"pid", "numbers"},
		"value":  {"mqueue_inode_info", "notify", "sigev_value"},
		"signal": {"mqueue_inode_info", "notify", "sigev_signo"}, "method": {"mqueue_inode_info", "notify", "sigev_notify"},
		"left": {"rb_node", "rb_left"}, "right": {"rb_node", "rb_right"},
		"node": {"posix_msg_tree_node", "rb_node"}, "list": {"posix_msg_tree_node", "msg_list"},
		"next": {"list_head", "next"}, "link": {"msg_msg", "m_list"},
		"priority": {"msg_msg", "m_type"}, "length": {"msg_msg", "m_ts"}, "rest": {"msg_msg", "next"},
	})
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	if q.at["head"], err = m.sizeOf("msg_msg"); err == nil {
		q.at["segment"], err = m.sizeOf("msg_msgseg")
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return q, nil
}

// Close frees the program.
func (q *Queues) Close() error { return q.m.Close() }

// Read answers about the queue behind one of this process's descriptors. While it
// reads the messages nobody may use the queue.
func (q *Queues) Read(fd int, messages bool) (*Queue, error) {
	inode, err := q.m.inode(fd)
	if err != nil {
		return nil, err
	}
	info := inode - uint64(q.at["inode"])
	out := &Queue{}
	if err := q.readNotification(info, out); err != nil {
		return nil, err
	}
	user, err := q.m.follow(info, q.at["user"])
	if err != nil {
		return nil, err
	}
	if out.Creator, err = q.number(user, "uid"); err != nil {
		return nil, err
	}
	if !messages {
		return out, nil
	}
	root, err := q.m.follow(info, q.at["tree"])
	if err != nil {
		return nil, err
	}
	w := queueWalk{q: q, out: out}
	if w.left, err = q.m.word(info + uint64(q.at["count"])); err != nil {
		return nil, err
	}
	if err := w.tree(root, 0); err != nil {
		return nil, err
	}
	if w.left != 0 {
		return nil, fmt.Errorf("%d messages of a queue are not found", w.left)
	}
	return out, nil
}

// number reads a member of 32 bits.
func (q *Queues) number(addr uint64, member string) (uint32, error) {
	b, err := q.m.read(addr+uint64(q.at[member]), 4)
	if err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint32(b), nil
}

func (q *Queues) readNotification(info uint64, out *Queue) error {
	owner, err := q.m.follow(info, q.at["owner"])
	if err != nil || owner == 0 {
		return err
	}
	pid, err := q.number(owner, "numbers") // the first is the host's
	if err != nil {
		return err
	}
	method, err := q.number(info, "method")
	if err != nil {
		return err
	}
	signal, err := q.number(info, "signal")
	if err != nil {
		return err
	}
	out.Owner, out.Method, out.Signal = int(pid), int32(method), int32(signal)
	out.Value, err = q.m.word(info + uint64(q.at["value"]))
	return err
}

// queueWalk goes through the messages of a queue: a tree of priorities, with a
// list of messages at each. It ends also where the tree changes meanwhile.
type queueWalk struct {
	q    *Queues
	out  *Queue
	left uint64 // messages not yet found
}

// deepest is more than any red-black tree of 32768 priorities is deep.
const deepest = 32

// tree visits the messages below a node, the highest priority first.
func (w *queueWalk) tree(node uint64, depth int) error {
	if node == 0 {
		return nil
	}
	if depth > deepest {
		return errors.New("the priorities of a queue are no tree")
	}
	right, err := w.q.m.follow(node, w.q.at["right"])
	if err == nil {
		err = w.tree(right, depth+1)
	}
	if err == nil {
		err = w.list(node - uint64(w.q.at["node"]) + uint64(w.q.at["list"]))
	}
	if err != nil {
		return err
	}
	left, err := w.q.m.follow(node, w.q.at["left"])
	if err != nil {
		return err
	}
	return w.tree(left, depth+1)
}

// list visits the messages of a priority, the oldest first.
func (w *queueWalk) list(head uint64) error {
	next, err := w.q.m.follow(head, w.q.at["next"])
	for ; err == nil && next != head; next, err = w.q.m.follow(next, w.q.at["next"]) {
		if w.left == 0 {
			return errors.New("a queue holds more messages than it says")
		}
		w.left--
		if err := w.message(next - uint64(w.q.at["link"])); err != nil {
			return err
		}
	}
	return err
}

// longestMessage is HARD_MSGSIZEMAX of include/linux/ipc_namespace.h.
const longestMessage = 16 << 20

// message reads one message: what does not fit in the page of its head lies in
// further pages, each with a pointer to the next (load_msg in ipc/msgutil.c).
func (w *queueWalk) message(addr uint64) error {
	m, at := w.q.m, w.q.at
	head, err := m.read(addr, int(at["head"]))
	if err != nil {
		return err
	}
	ne := binary.NativeEndian
	length := ne.Uint64(head[at["length"]:])
	if length > longestMessage {
		return fmt.Errorf("a message of %d bytes", length)
	}
	text := make([]byte, 0, length)
	next := ne.Uint64(head[at["rest"]:])
	for from, skip := addr, uint64(at["head"]); ; skip = uint64(at["segment"]) {
		n := min(length-uint64(len(text)), answerSize-skip)
		part, err := m.read(from+skip, int(n))
		if err != nil {
			return err
		}
		text = append(text, part...)
		if uint64(len(text)) == length {
			break
		}
		if from = next; from == 0 {
			return io.ErrUnexpectedEOF
		}
		if next, err = m.word(from); err != nil { // the first member
			return err
		}
	}
	w.out.Messages = append(w.out.Messages, QueueMessage{Priority: uint32(ne.Uint64(head[at["priority"]:])), Text: text})
	return nil
}
