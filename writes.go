package main

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	maxBatchBytes = 512 << 10             // of commands in one log entry, but for a single larger one
	maxWaiting    = 32 << 20              // bytes of commands that may wait; beyond it the node is overloaded
	maxLinger     = 10 * time.Millisecond // that a batch waits for the commands that are expected
	maxPatience   = 16                    // how often batches may do so in vain, after as many that did not
	impatience    = 64                    // batches that do not wait, after that
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

// write is a command on its way to a log entry, or all those that another node passed on in one message.
type write struct {
	commands [][]byte
	bytes    int  // of commands
	hop      bool // another node passed it on to us, so we pass it on to nobody
	done     chan outcome

	taken     bool // it is in a batch: from here on it may be executed. Guarded by writes.mu
	abandoned bool // nobody waits for it any more, and it never was in a batch. Guarded by writes.mu
}

func newWrite(commands ...[]byte) *write {
	w := &write{commands: commands, done: make(chan outcome, 1)}
	for _, c := range commands {
		w.bytes += len(c)
	}
	return w
}

// proposer is what writes needs of its node. The Store is one.
type proposer interface {
	// propose appends an entry of these commands to Raft's log; it returns nil when this node does not lead.
	propose(commands [][]byte) raft.ApplyFuture
	// leadsNow says whether this node is the leader.
	leadsNow() bool
	// callLeader asks the leader; see Store.callLeader.
	callLeader(op byte, request []byte, timeout time.Duration) ([]byte, error)
}

// writes takes commands into the log. Those that arrive while others are being committed gather into one log entry, or,
// on a node that does not lead, into one message to the leader (group commit: DeWitt et al., "Implementation Techniques
// for Main Memory Database Systems", 1984).
type writes struct {
	log     hclog.Logger
	metrics *metrics
	node    proposer

	wake   chan struct{} // holds one token: there may be something to take
	entry  chan struct{} // a token while the leader commits an entry
	passed chan struct{} // a token while a batch is being passed on
	ended  chan struct{} // closed when run has ended

	mu      sync.Mutex // guards what follows, and taken and abandoned of every write
	waiting []*write
	count   int // of the commands in waiting
	bytes   int // of them
	// Of the last batch: how many commands had been in it or waited when it was done, and how long it took.
	expected int
	took     time.Duration

	patience int // how often batches may yet wait in vain; below 0, how many will not wait. For run alone
}

func newWrites(node proposer, m *metrics, log hclog.Logger) *writes {
	return &writes{
		log: log, metrics: m, node: node,
		wake:   make(chan struct{}, 1),
		entry:  make(chan struct{}, 1),
		passed: make(chan struct{}, 1),
		ended:  make(chan struct{}),
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
// A batch costs as much as dozens of commands, on every node, and a second one beside it would be under way for as long as if
// it waited, and hold less. So what arrives while one is under way is the next. What a node has passed on to a leader that has
// stopped answering does not hold up its own entries when it becomes the leader itself.
func (b *writes) run(ctx context.Context) {
	defer close(b.ended)
	for {
		select {
		case <-b.wake:
		case <-ctx.Done():
			return
		}
		for {
			slot := b.passed
			if b.node.leadsNow() {
				slot = b.entry
			}
			select {
			case slot <- struct{}{}:
			case <-time.After(retryInterval): // it may have become the leader
				continue
			case <-ctx.Done():
				return
			}
			b.gather(ctx)
			batch := b.take()
			if len(batch) == 0 {
				<-slot
				break
			}
			go func() {
				b.commit(batch)
				<-slot
			}()
		}
	}
}

// gather waits for the commands that are expected, for as long as the last batch took at most: those who were just answered
// often come back at once, and one batch of all costs less than two that take turns. (PostgreSQL's commit_delay waits like
// this, for a fixed time.) Where commands come on their own account, at any time, fewer are there than expected most times;
// then the next batches do not wait, until one tries again.
func (b *writes) gather(ctx context.Context) {
	count, expected, linger := b.outlook()
	if count == 0 || count >= expected {
		return
	}
	if b.patience < 0 {
		b.patience++
		return
	}
	for timeout := time.After(linger); count < expected; count, expected, _ = b.outlook() {
		select {
		case <-b.wake:
			continue
		case <-timeout:
		case <-ctx.Done():
		}
		break
	}
	if count >= expected {
		b.patience = min(b.patience+1, maxPatience)
	} else if b.patience--; b.patience < 0 {
		b.patience = -impatience
	}
}

// outlook returns how many commands wait, for how many it is worth to wait, and how long.
func (b *writes) outlook() (count, expected int, linger time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bytes >= maxBatchBytes {
		return b.count, b.count, 0
	}
	return b.count, b.expected, min(b.took, maxLinger)
}

// learn takes note of a batch that is done, before its clients hear of it: they and those who wait now are likely to be there
// for the next.
func (b *writes) learn(batch []*write, took time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.took = took
	b.expected = b.count
	for _, w := range batch {
		b.expected += len(w.commands)
	}
}

// idle waits until the leader commits no entry and says whether that came about before ctx ended.
func (b *writes) idle(ctx context.Context) bool {
	select {
	case b.entry <- struct{}{}:
		<-b.entry
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

// take returns the next batch: all that wait, up to maxBatchBytes.
func (b *writes) take() []*write {
	b.mu.Lock()
	defer b.mu.Unlock()
	var batch []*write
	size, n := 0, 0
	for ; n < len(b.waiting); n++ {
		w := b.waiting[n]
		if size += w.bytes; size > maxBatchBytes && len(batch) > 0 {
			break
		}
		b.count -= len(w.commands)
		b.bytes -= w.bytes
		if !w.abandoned {
			w.taken = true
			batch = append(batch, w)
		}
	}
	if b.waiting = b.waiting[n:]; len(b.waiting) == 0 {
		b.waiting = nil
	}
	return batch
}

// wait returns the outcome of a write that was added. When ctx ends first, the write is either withdrawn or unknown.
func (b *writes) wait(ctx context.Context, w *write) outcome {
	select {
	case o := <-w.done:
		return o
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case len(w.done) > 0:
		return <-w.done
	case w.taken:
		return outcome{err: ErrUnknownOutcome}
	}
	w.abandoned = true
	return outcome{err: ErrNotInTime}
}

// commit gives every write of a batch its outcome: the leader appends one log entry, any other node passes on to the
// leader what has not been passed on already.
func (b *writes) commit(batch []*write) {
	began := time.Now()
	if future := b.node.propose(commandsOf(batch)); future != nil {
		all := b.await(future)
		b.learn(batch, time.Since(began))
		share(batch, all)
		return
	}
	own := batch[:0]
	for _, w := range batch {
		if w.hop {
			w.done <- outcome{err: ErrNotLeader}
		} else {
			own = append(own, w)
		}
	}
	if len(own) > 0 {
		all := b.forward(commandsOf(own))
		b.learn(own, time.Since(began))
		share(own, all)
	}
}

func commandsOf(batch []*write) [][]byte {
	commands := make([][]byte, 0, len(batch))
	for _, w := range batch {
		commands = append(commands, w.commands...)
	}
	return commands
}

// share gives every write its part of the outcome of all.
func share(batch []*write, all outcome) {
	n := 0
	for _, w := range batch {
		n += len(w.commands)
	}
	if all.err == nil && len(all.results) != n {
		all = outcome{err: ErrUnknownOutcome}
	}
	for _, w := range batch {
		part := outcome{index: all.index, err: all.err}
		if all.err == nil {
			part.results, all.results = all.results[:len(w.commands)], all.results[len(w.commands):]
		}
		w.done <- part
	}
}

// await returns the outcome of a log entry when it has one.
func (b *writes) await(future raft.ApplyFuture) outcome {
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- future.Error() }()
	select {
	case err := <-done:
		b.metrics.commit.Observe(time.Since(began).Seconds())
		results, _ := future.Response().([][]byte)
		switch {
		case err == nil:
			return outcome{index: future.Index(), results: results}
		case future.Index() == 0:
			return outcome{err: ErrNotLeader} // it never was in the log
		}
		b.log.Debug("a log entry failed", "index", future.Index(), "error", err)
	case <-b.ended: // Raft may leave a future unanswered when it shuts down
	}
	return outcome{err: ErrUnknownOutcome} // the next leader may still commit the entry
}

// forward passes commands on to the leader.
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

// handleApply executes commands that another node passed on to this one. It answers with an error only when none of
// them can have been executed.
func (b *writes) handleApply(ctx context.Context, _ string, request []byte) ([]byte, error) {
	// A batch is no longer than that with the lengths of its commands; only a single command is. A message of nothing but
	// empty ones would take a hundred times its size in memory.
	if size, n := binary.Uvarint(request); len(request) > 2*maxBatchBytes && size != uint64(len(request)-n) {
		return nil, errors.New("the commands are more than a batch")
	}
	commands, err := decodeCommands(request)
	if err != nil {
		return nil, err
	}
	w := newWrite(commands...)
	w.hop = true
	return encodeOutcome(b.execute(ctx, w)), nil
}

// The outcome of commands that were passed on travels as one byte of status, the entry's index as a uvarint, and each
// result behind its length. A status names one of these errors, 0 none: the numbers are a format.
var outcomeErrors = []error{0: nil, 1: ErrNotLeader, 2: ErrOverloaded, 3: ErrNotInTime, 4: ErrUnknownOutcome}

func encodeOutcome(o outcome) []byte {
	status := byte(4) // an error that is not in the list promises nothing
	for i, err := range outcomeErrors {
		if o.err == nil && i == 0 || err != nil && errors.Is(o.err, err) {
			status = byte(i)
			break
		}
	}
	return appendCommands(binary.AppendUvarint([]byte{status}, o.index), o.results)
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
