// Package image reads and writes the checkpoint stream: its framing, its
// record types, the references between its objects and its integrity.
//
// The package is pure. It makes no system call, knows nothing of ptrace or
// /proc and runs without privileges, so that tools which only look at images
// can use it. A stream is written once, front to back, by a Writer and read
// the same way by a Reader; neither seeks, so it may be a file, a pipe or a
// socket. Both hold a stream to the same rules: a Writer refuses to write what
// a Reader would refuse to read, while the container is still there to be
// resumed.
//
// A reader trusts nothing in a stream. Every length is bounded before it is
// used, every record's checksum is verified before its contents are decoded,
// and Head returns only what has passed all checks. What a good image says is
// still only a claim: whether its paths, ids and capabilities may be granted
// is for the restore to decide.
//
// docs/image.md describes the format for readers in other languages.
package image
