package main

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	maxEntryBytes = 128 << 10             // of commands in one log entry, but for a single larger write
	maxBatchBytes = 1 << 20               // of the entries of one batch
	maxForwards   = callsPerPeer / 2      // entries of a batch that another node than the leader takes
	maxWaiting    = 32 << 20              // bytes of commands that may wait; beyond it the node is overloaded
	maxLinger     = 10 * time.Millisecond // that a batch waits for the commands that are expected
	maxCredit     = 16                    // batches that may do so in vain, after as many that did not
	lingerPause   = 64                    // batches that do not do so, after that
)

// Result is what a command came to: the index of the log entry that holds it, and what StateMachine.Apply returned.
type Result struct {
	Index uint64
	Data  []byte
}

// outcome is what became of commands that went into one log entry: executed (err is nil), certainly not executed, or
// unknown (ErrUnknownOutcome).
type outcome struct {
	index   uint64   // of the entry
	results [][]byte // one for each command
	err     error
}

// write is a command that waits to get into a log entry, or all those that another node has forwarded in one message.
type write struct {
	commands  [][]byte
	bytes     int          // of commands
	forwarded bool         // by another node: we forward it to nobody
	done      chan outcome // has room for the only one
}

func newWrite(commands ...[]byte) *write {
	w := &write{commands: commands, done: make(chan outcome, 1)}
	for _, c := range commands {
		w.bytes += len(c)
	}
	return w
}

// entry is what goes into one log entry together, and has one outcome.
type entry []*write

// count returns the number of its commands.
func (e entry) count() (n int) {
	for _, w := range e {
		n += len(w.commands)
	}
	return n
}

// commands returns those of all its writes.
func (e entry) commands() [][]byte {
	commands := make([][]byte, 0, e.count())
	for _, w := range e {
		commands = append(commands, w.commands...)
	}
	return commands
}

// share gives every write its part of the outcome of all.
func (e entry) share(all outcome) {
	if all.err == nil && len(all.results) != e.count() {
		all = outcome{err: ErrUnknownOutcome}
	}
	for _, w := range e {
		part := outcome{index: all.index, err: all.err}
		if all.err == nil {
			part.results, all.results = all.results[:len(w.commands)], all.results[len(w.commands):]
		}
		w.done <- part
	}
}

// proposer is what writes needs of its node. The Store is one.
type proposer interface {
	// propose appends entries to Raft's log; it returns nil when this node does not lead.
	propose(batch []entry) []raft.ApplyFuture
	// leadsNow says whether this node is the leader.
	leadsNow() bool
	// callLeader sends the leader a call; see Store.callLeader.
	callLeader(op byte, request []byte, timeout time.Duration) ([]byte, error)
}

// writes puts commands into the log. Those that arrive while others are being committed gather into one log entry, or,
// on a node that does not lead, into one message to the leader (group commit: DeWitt et al., "Implementation Techniques
// for Main Memory Database Systems", 1984).
type writes struct {
	log     hclog.Logger
	metrics *metrics
	node    proposer

	wake       chan struct{} // holds a token when there may be something waiting
	committing chan struct{} // holds a token while this leader commits an entry
	forwarding chan struct{} // holds a token while a batch is being forwarded

	mu      sync.Mutex // guards what follows
	waiting []*write
	count   int // of the commands in waiting
	bytes   int // of them
	// Of the last batch: how many commands had been in it or waited when it was done, and how long it took.
	expected int
	took     time.Duration

	credit int // batches that may yet linger in vain; below 0, batches that will not linger. For run alone
}

func newWrites(node proposer, m *metrics, log hclog.Logger) *writes {
	return &writes{
		log: log, metrics: m, node: node,
		wake:       make(chan struct{}, 1),
		committing: make(chan struct{}, 1),
		forwarding: make(chan struct{}, 1),
	}
}

// submit has a command executed, and waits for its outcome as long as ctx allows.
func (b *writes) submit(ctx context.Context, command []byte) outcome {
	return b.execute(ctx, newWrite(command))
}

func (b *writes) execute(ctx context.Context, w *write) outcome {
	if err := b.add(w); err != nil {
		return outcome{err: err}
	}
	return b.wait(ctx, w)
}

// run commits batches until ctx ends.
//
// A batch costs as much as dozens of commands, on every node, and a second one beside it would be under way for as long
// as if it waited, and hold less. So what arrives while one is under way is the next. What a node has forwarded to a
// leader that has stopped answering does not hold up its own entries when it becomes the leader itself.
func (b *writes) run(ctx context.Context) {
	for {
		select {
		case <-b.wake:
		case <-ctx.Done():
			return
		}
		for b.commitNext(ctx) {
		}
	}
}

// commitNext waits for the batch before and starts to commit the next, in a goroutine that ends when its outcome is
// known or ctx ends. It returns false when no command waits, or ctx has ended.
func (b *writes) commitNext(ctx context.Context) bool {
	slot, most := b.forwarding, maxForwards
	if b.node.leadsNow() {
		slot, most = b.committing, maxAppendEntries
	}
	select {
	case slot <- struct{}{}:
	case <-time.After(retryInterval): // this node may have become the leader
		return true
	case <-ctx.Done():
		return false
	}
	b.linger(ctx)
	batch := b.take(most)
	if len(batch) == 0 {
		<-slot
		return false
	}
	go func() {
		b.commit(ctx, batch)
		<-slot
	}()
	return true
}

// linger waits for the commands that are expected, for as long as the last batch took at most: clients who were just
// answered often send the next command at once, and one batch of all costs less than two that take turns. (PostgreSQL's
// commit_delay waits like this, for a fixed time.) Where commands come at random times fewer than expected come most
// times. Then the next batches do not wait.
func (b *writes) linger(ctx context.Context) {
	count, expected, limit := b.outlook()
	if count == 0 || count >= expected {
		return
	}
	if b.credit < 0 {
		b.credit++
		return
	}
	for timeout := time.After(limit); count < expected; count, expected, _ = b.outlook() {
		select {
		case <-b.wake:
			continue
		case <-timeout:
		case <-ctx.Done():
		}
		break
	}
	if count >= expected {
		b.credit = min(b.credit+1, maxCredit)
	} else if b.credit--; b.credit < 0 {
		b.credit = -lingerPause
	}
}

// outlook returns how many commands wait, how many are expected, and how long at most it is worth to wait for them.
func (b *writes) outlook() (count, expected int, limit time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bytes >= maxBatchBytes {
		return b.count, b.count, 0
	}
	return b.count, b.expected, min(b.took, maxLinger)
}

// learn takes note of a batch that is done, before its clients hear of it: they and those who wait now are likely to be
// there for the next.
func (b *writes) learn(batch []entry, took time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.took = took
	b.expected = b.count
	for _, e := range batch {
		b.expected += e.count()
	}
}

// idle waits until this leader commits no entry. It returns false when ctx has ended before.
func (b *writes) idle(ctx context.Context) bool {
	select {
	case b.committing <- struct{}{}:
		<-b.committing
		return true
	case <-ctx.Done():
		return false
	}
}

// queued returns the size of the commands that wait, in bytes.
func (b *writes) queued() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bytes
}

// add queues a write.
func (b *writes) add(w *write) error {
	b.mu.Lock()
	if b.bytes > 0 && b.bytes+w.bytes > maxWaiting {
		b.mu.Unlock()
		return ErrOverloaded
	}
	b.waiting = append(b.waiting, w)
	b.count += len(w.commands)
	b.bytes += w.bytes
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
	return nil
}

// take returns the next batch: what waits for longest, as most entries at most.
func (b *writes) take(most int) (batch []entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for total := 0; len(b.waiting) > 0 && len(batch) < most; {
		n, bytes := 0, 0
		for n < len(b.waiting) && (n == 0 || bytes+b.waiting[n].bytes <= maxEntryBytes) {
			bytes += b.waiting[n].bytes
			n++
		}
		if total += bytes; total > maxBatchBytes && len(batch) > 0 {
			break
		}
		next := entry(b.waiting[:n:n])
		batch, b.waiting = append(batch, next), b.waiting[n:]
		b.count -= next.count()
		b.bytes -= bytes
	}
	if len(b.waiting) == 0 {
		b.waiting = nil
	}
	return batch
}

// wait returns the outcome of a write that was added. When ctx ends first, the write is withdrawn if it is in no batch
// yet; else it may be executed.
func (b *writes) wait(ctx context.Context, w *write) outcome {
	select {
	case o := <-w.done:
		return o
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := slices.Index(b.waiting, w); i >= 0 {
		b.waiting = slices.Delete(b.waiting, i, i+1)
		b.count -= len(w.commands)
		b.bytes -= w.bytes
		return outcome{err: ErrNotInTime}
	}
	select {
	case o := <-w.done:
		return o
	default:
		return outcome{err: ErrUnknownOutcome}
	}
}

// commit gives every write of a batch its outcome: the leader appends the entries, any other node forwards to the
// leader what was not forwarded to it, each entry in a call of its own.
func (b *writes) commit(ctx context.Context, batch []entry) {
	began := time.Now()
	futures := b.node.propose(batch)
	if futures == nil {
		batch = refuseForwarded(batch)
	}
	outcomes := make([]outcome, len(batch))
	var wg sync.WaitGroup
	for i, e := range batch {
		if futures != nil {
			outcomes[i] = b.await(ctx, futures[i])
		} else {
			wg.Go(func() { outcomes[i] = b.forward(e.commands()) })
		}
	}
	wg.Wait()
	b.learn(batch, time.Since(began))
	for i, e := range batch {
		e.share(outcomes[i])
	}
}

// refuseForwarded gives the writes that another node has forwarded their outcome, and returns the others.
func refuseForwarded(batch []entry) (own []entry) {
	for _, e := range batch {
		var rest entry
		for _, w := range e {
			if w.forwarded {
				w.done <- outcome{err: ErrNotLeader}
			} else {
				rest = append(rest, w)
			}
		}
		if len(rest) > 0 {
			own = append(own, rest)
		}
	}
	return own
}

// await returns the outcome of a log entry when it has one, or ctx ends.
func (b *writes) await(ctx context.Context, future raft.ApplyFuture) outcome {
	began := time.Now()
	err := within(ctx, future.Error)
	switch {
	case err == nil:
		b.metrics.commit.Observe(time.Since(began).Seconds())
		results, _ := future.Response().([][]byte)
		return outcome{index: future.Index(), results: results}
	case ctx.Err() == nil && future.Index() == 0:
		return outcome{err: ErrNotLeader} // it never was in the log
	}
	b.log.Debug("a log entry failed", "error", err)
	return outcome{err: ErrUnknownOutcome} // the next leader may still commit the entry
}

// forward sends commands to the leader.
func (b *writes) forward(commands [][]byte) outcome {
	b.metrics.forwarded.Add(float64(len(commands)))
	answer, err := b.node.callLeader(opApply, appendCommands(nil, commands), requestTimeout)
	if err != nil {
		return outcome{err: err}
	}
	o, err := decodeOutcome(answer)
	if err != nil {
		b.log.Error("the leader's answer makes no sense", "error", err)
		return outcome{err: ErrUnknownOutcome}
	}
	return o
}

// handleApply executes commands that another node forwarded to this one. It answers with an error only when none of
// them can have been executed.
func (b *writes) handleApply(ctx context.Context, _ string, request []byte) ([]byte, error) {
	// An entry is no longer than that with the lengths of its commands; only a single command is. A message of nothing
	// but empty ones would take a hundred times its size in memory.
	if size, n := binary.Uvarint(request); len(request) > maxBatchBytes && size != uint64(len(request)-n) {
		return nil, errors.New("the commands are more than an entry")
	}
	commands, err := decodeCommands(request)
	if err != nil {
		return nil, err
	}
	w := newWrite(commands...)
	w.forwarded = true
	return encodeOutcome(b.execute(ctx, w)), nil
}

// The outcome of forwarded commands travels as one byte of status, the entry's index as a uvarint, and each
// result behind its length. A status names one of these errors, 0 none: the numbers are a format.
var outcomeErrors = []error{0: nil, 1: ErrNotLeader, 2: ErrOverloaded, 3: ErrNotInTime, 4: ErrUnknownOutcome}

func encodeOutcome(o outcome) []byte {
	status := slices.IndexFunc(outcomeErrors, func(err error) bool { return errors.Is(o.err, err) })
	if status < 0 {
		status = 4 // an error that is not in the list promises nothing
	}
	return appendCommands(binary.AppendUvarint([]byte{byte(status)}, o.index), o.results)
}

func decodeOutcome(b []byte) (o outcome, err error) {
	malformed := errors.New("malformed outcome")
	if len(b) == 0 || int(b[0]) >= len(outcomeErrors) {
		return o, malformed
	}
	o.err = outcomeErrors[b[0]]
	index, n := binary.Uvarint(b[1:])
	if n <= 0 {
		return o, malformed
	}
	o.index = index
	o.results, err = decodeCommands(b[1+n:])
	return o, err
}
