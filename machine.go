package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// StateMachine is the state that the cluster replicates. To build another service, write one of these. It needs no
// locks: the Store calls one method at a time, and none while the func given to Store.Read or Store.Capture runs.
// Restore is the exception.
type StateMachine interface {
	// Apply executes one committed command and returns its result, which Store.Apply returns on the node that was
	// asked. An empty result arrives as nil or as empty. Apply must not keep the command's memory.
	//
	// Every node executes every command. So that all get the same state, Apply uses nothing but the state, the command
	// and at: no clock, no random numbers, no iteration over a Go map. at is the leader's clock when it took the
	// command. It can go back: node1 leads with a clock that is 2 s fast, and then node2 leads. A machine with
	// deadlines therefore keeps the latest time that it has seen in its state, and writes it into its snapshots:
	//
	//	if at.After(m.now) {
	//		m.now = at
	//	}
	//
	// A command that is not allowed (a lock that is taken, say) gets a result that says so. An error means that the
	// command cannot be read. Then every node stops, and stops again when it restarts: a node that skipped the command
	// would have another state than the others. A command should begin with a byte for its version or kind.
	Apply(command []byte, at time.Time) (result []byte, err error)
	// Snapshot captures the state and returns at once. The func that it returns writes what was captured, while later
	// commands are applied. With KV_STORE=memory that func is kept until the next snapshot, and called for each node
	// that needs the snapshot, perhaps for two at once. Equal states must give equal bytes.
	Snapshot() (write func(io.Writer) error)
	// Restore reads what a snapshot's func wrote, up to io.EOF (as io.ReadAll does; json.Decoder may not). It must not
	// change the state: other methods and Read may run meanwhile. The func that it returns replaces the state; it is
	// called when the checksum at the end of the snapshot has been found right, and not after an error.
	Restore(r io.Reader) (install func(), err error)
	// Len returns how many keys, or other things that an operator wants to see counted, the state holds.
	Len() int
}

// replica is this node's copy of the state machine. The raft package calls its methods (it is a raft.FSM).
type replica struct {
	mu      sync.RWMutex // guards machine: Apply and install write, Read reads
	machine StateMachine
	metrics *metrics
	applied progress // index of the last command or configuration that has been executed here
	config  progress // index of the last configuration that has been executed here since the start
	// maxVersion is the newest version of commands that has been executed. See upgrade.go.
	maxVersion atomic.Uint32
	// fail stops the process with a reason. It does not return.
	fail     func(error)
	released chan struct{} // holds a token when Raft is done with a snapshot, whether that worked or not
}

// read runs f while no command is being applied.
func (r *replica) read(f func()) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	f()
}

// capture runs f while nothing else uses the machine, and returns the index of the last entry that it has executed.
func (r *replica) capture(f func()) (index uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	return r.applied.load()
}

// size returns the machine's Len.
func (r *replica) size() (n int) {
	r.read(func() { n = r.machine.Len() })
	return n
}

// Apply executes the commands of one log entry and returns their results as [][]byte.
func (r *replica) Apply(entry *raft.Log) any {
	at, commands, err := decodeEntry(entry.Data)
	if err != nil {
		r.fail(fmt.Errorf("log entry %d: %w", entry.Index, err))
		return nil
	}
	defer r.failOnPanic("log entry %d", entry.Index)
	began := time.Now()
	results := make([][]byte, len(commands))
	r.mu.Lock()
	for i, command := range commands {
		r.maxVersion.Store(max(r.maxVersion.Load(), uint32(r.commandVersion(command))))
		if results[i], err = r.machine.Apply(command, at); err != nil {
			r.mu.Unlock()
			r.fail(fmt.Errorf("log entry %d, command %d: %w", entry.Index, i, err))
			return nil
		}
	}
	r.applied.advance(entry.Index)
	r.mu.Unlock()
	r.metrics.apply.Observe(time.Since(began).Seconds())
	r.metrics.batch.Observe(float64(len(commands)))
	return results
}

// StoreConfiguration records the index of a committed configuration, since Raft does not tell which index it has.
func (r *replica) StoreConfiguration(index uint64, _ raft.Configuration) {
	r.config.advance(index)
	r.applied.advance(index)
}

// failOnPanic, deferred, stops the process when the state machine has panicked in what is said.
func (r *replica) failOnPanic(doing string, args ...any) {
	if cause := recover(); cause != nil {
		r.fail(fmt.Errorf("%s: the state machine panicked: %v\n%s", fmt.Sprintf(doing, args...), cause, debug.Stack()))
	}
}

// Snapshot captures the state for raft's log compaction.
func (r *replica) Snapshot() (raft.FSMSnapshot, error) {
	defer r.failOnPanic("take a snapshot")
	r.mu.Lock()
	defer r.mu.Unlock()
	return &snapshot{
		index: r.applied.load(), maxVersion: byte(r.maxVersion.Load()),
		write: r.machine.Snapshot(), released: r.released,
	}, nil
}

// Restore replaces the state by that of a snapshot. If it cannot be read the process stops: Raft would go on with an
// older snapshot.
func (r *replica) Restore(source io.ReadCloser) error {
	defer r.failOnPanic("restore a snapshot")
	err := r.restore(source)
	if err != nil {
		r.fail(fmt.Errorf("restore a snapshot: %w", err))
	}
	return err
}

// restore replaces the state when the whole snapshot has been read and its checksum is right. Until then readers see
// the old state.
func (r *replica) restore(source io.Reader) error {
	reader := &snapshotReader{r: bufio.NewReaderSize(source, snapshotBuffer)}
	index, maxVersion, err := reader.header()
	if err != nil {
		return fmt.Errorf("snapshot header: %w", err)
	}
	if known := r.knownVersion(); maxVersion > known {
		return fmt.Errorf("snapshot: it has the effects of commands of version %d, and this binary knows %d at most: "+
			"start this node with the newer binary", maxVersion, known)
	}
	install, err := r.machine.Restore(reader)
	left, damage := reader.finish()
	if damage != nil {
		err = damage // it explains the state machine's error
	}
	if err == nil && left > 0 {
		err = fmt.Errorf("the state machine has left %d bytes of it unread", left)
	}
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	r.mu.Lock()
	install()
	r.maxVersion.Store(uint32(maxVersion))
	r.applied.advance(index)
	r.mu.Unlock()
	return nil
}

// snapshot is a captured state (a raft.FSMSnapshot).
type snapshot struct {
	index      uint64 // of the last entry that has been executed in it
	maxVersion byte   // newest version of commands that has been executed in it
	write      func(io.Writer) error
	released   chan<- struct{}
}

// lateSink is a snapshot sink that can keep the func that writes a snapshot, in place of the bytes that it writes.
type lateSink interface {
	// writeLater returns false if the sink wants the bytes.
	writeLater(write func(io.Writer) error) bool
}

// Persist writes the snapshot to sink.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	if late, ok := sink.(lateSink); ok && late.writeLater(s.writeTo) {
		return sink.Close()
	}
	if err := s.writeTo(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release is called when Raft is done with the snapshot.
func (s *snapshot) Release() {
	select {
	case s.released <- struct{}{}:
	default:
	}
}

// progress is a log index that only grows, and that goroutines can wait for. Its zero value is ready to use.
type progress struct {
	mu    sync.Mutex // guards both
	index uint64
	moved chan struct{} // closed when index grows; nil while nobody waits
}

func (p *progress) load() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.index
}

func (p *progress) advance(index uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.index = max(p.index, index)
	if p.moved != nil {
		close(p.moved)
		p.moved = nil
	}
}

// wait returns once the index is at least want, or with ctx's error.
func (p *progress) wait(ctx context.Context, want uint64) error {
	for {
		p.mu.Lock()
		if p.index >= want {
			p.mu.Unlock()
			return nil
		}
		if p.moved == nil {
			p.moved = make(chan struct{})
		}
		moved := p.moved
		p.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// The format of a log entry, on disk and between nodes: a version byte, the CRC-32C of all that follows it, the
// leader's clock in microseconds since 1970, and then each command behind its length as a uvarint.
const (
	entryVersion = 1
	entryHeader  = 1 + 4 + 8
)

func encodeEntry(at time.Time, commands [][]byte) []byte {
	size := entryHeader
	for _, c := range commands {
		size += len(c) + binary.MaxVarintLen32
	}
	b := make([]byte, entryHeader, size)
	b[0] = entryVersion
	binary.BigEndian.PutUint64(b[5:], uint64(at.UnixMicro()))
	b = appendCommands(b, commands)
	binary.BigEndian.PutUint32(b[1:], crc32.Checksum(b[5:], castagnoli))
	return b
}

// checkEntry says whether an entry is as it was written.
func checkEntry(b []byte) error {
	if len(b) < entryHeader {
		return fmt.Errorf("%d bytes are too few for an entry", len(b))
	}
	if b[0] != entryVersion {
		return fmt.Errorf("entry version %d is not known to this binary; was it written by a newer one?", b[0])
	}
	if crc32.Checksum(b[5:], castagnoli) != binary.BigEndian.Uint32(b[1:]) {
		return errors.New("checksum mismatch: the log is damaged")
	}
	return nil
}

// decodeEntry returns commands that share b's memory.
func decodeEntry(b []byte) (at time.Time, commands [][]byte, err error) {
	if err := checkEntry(b); err != nil {
		return at, nil, err
	}
	at = time.UnixMicro(int64(binary.BigEndian.Uint64(b[5:]))).UTC() // in local time nodes would differ
	commands, err = decodeCommands(b[entryHeader:])
	return at, commands, err
}

// executeEntry calls execute with each command of an entry, until one returns an error.
func executeEntry(b []byte, execute func(command []byte, at time.Time) error) error {
	at, commands, err := decodeEntry(b)
	for i := 0; err == nil && i < len(commands); i++ {
		err = execute(commands[i], at)
	}
	return err
}

func appendCommands(b []byte, commands [][]byte) []byte {
	for _, c := range commands {
		b = appendString(b, c)
	}
	return b
}

// decodeCommands returns commands that share b's memory.
func decodeCommands(b []byte) (commands [][]byte, err error) {
	d := decoder{b: b}
	for len(d.b) > 0 && !d.bad {
		commands = append(commands, d.bytes())
	}
	if d.bad {
		return nil, errors.New("a command is longer than what holds it")
	}
	return commands, nil
}

// The format of a snapshot, on disk and between nodes: snapshotMagic or snapshotMagic3, whose last byte is the version;
// the applied index in 8 bytes; in version 3 a byte, the newest version of commands executed; what the state machine
// has written; and the CRC-32C of all that. Version 3 is written when a command of another version than the first has
// been executed: until then older binaries can read the snapshot.
const (
	snapshotMagic  = "RSTSNAP\x02"
	snapshotMagic3 = "RSTSNAP\x03"
	snapshotBuffer = 64 << 10 // bytes that are read or written at once
)

func (s *snapshot) writeTo(w io.Writer) error {
	sum := crc32.New(castagnoli)
	b := bufio.NewWriterSize(io.MultiWriter(w, sum), snapshotBuffer)
	head := binary.BigEndian.AppendUint64([]byte(snapshotMagic), s.index)
	if s.maxVersion > firstCommandVersion {
		head = append(binary.BigEndian.AppendUint64([]byte(snapshotMagic3), s.index), s.maxVersion)
	}
	_, err := b.Write(head)
	if err := errors.Join(err, s.write(b), b.Flush()); err != nil {
		return err
	}
	_, err = w.Write(sum.Sum(nil))
	return err
}

// snapshotReader reads a snapshot up to its checksum. There it returns io.EOF.
type snapshotReader struct {
	r   *bufio.Reader
	sum uint32 // of what has been read
}

func (s *snapshotReader) Read(p []byte) (int, error) {
	ahead, err := s.r.Peek(min(len(p)+checksumSize, s.r.Size()))
	n := len(ahead) - checksumSize
	if n < 0 {
		if errors.Is(err, io.EOF) {
			err = errors.New("the snapshot is cut short")
		}
		return 0, err
	}
	n = copy(p, ahead[:n])
	s.sum = crc32.Update(s.sum, castagnoli, p[:n])
	_, _ = s.r.Discard(n) // it is in the buffer
	return n, err
}

func (s *snapshotReader) header() (index uint64, maxVersion byte, err error) {
	var head [len(snapshotMagic) + 8]byte
	if _, err := io.ReadFull(s, head[:]); err != nil {
		return 0, 0, err
	}
	version := []byte{firstCommandVersion}
	switch string(head[:len(snapshotMagic)]) {
	case snapshotMagic:
	case snapshotMagic3:
		if _, err := io.ReadFull(s, version); err != nil {
			return 0, 0, err
		}
	default:
		return 0, 0, errors.New("not a snapshot of this service, or one of a version that this binary does not know")
	}
	return binary.BigEndian.Uint64(head[len(snapshotMagic):]), version[0], nil
}

// finish reads the rest, returns how many bytes of the state it held, and compares the checksum.
func (s *snapshotReader) finish() (left int64, err error) {
	if left, err = io.Copy(io.Discard, s); err != nil {
		return left, err
	}
	sum, err := s.r.Peek(checksumSize)
	if err == nil && binary.BigEndian.Uint32(sum) != s.sum {
		err = errors.New("checksum mismatch: the snapshot is damaged or cut short")
	}
	return left, err
}
