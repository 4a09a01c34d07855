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
	maxBatchBytes   = 256 << 10 // of commands in one log entry, but for a single larger one
	batchesInFlight = 2         // entries being committed, or batches being passed on, while the next one gathers
	maxWaiting      = 32 << 20  // bytes of commands that may wait; beyond it the node is overloaded
)

// Result is what a command came to: the index of the log entry that holds it, and what StateMachine.Apply returned.
type Result struct {
	Index uint64
	Data  []byte
}

// outcome is what became of a command: executed (err is nil), certainly not executed, or unknown (ErrUnknownOutcome).
type outcome struct {
	Result
	err error
}

// write is a command on its way to a log entry.
type write struct {
	command []byte
	hop     bool // another node passed it on to us, so we pass it on to nobody
	done    chan outcome

	taken     bool // it is in a batch: from here on it may be executed. Guarded by writes.mu
	abandoned bool // nobody waits for it any more, and it never was in a batch. Guarded by writes.mu
}

// writes takes commands into the log. Those that arrive while others are being committed gather into one log entry, or,
// on a node that does not lead, into one message to the leader (group commit: DeWitt et al., "Implementation Techniques
// for Main Memory Database Systems", 1984).
type writes struct {
	log     hclog.Logger
	metrics *metrics
	// propose appends an entry of these commands to Raft's log; it returns nil when this node does not lead.
	propose func(commands [][]byte) raft.ApplyFuture
	// callLeader asks the leader; see Store.callLeader.
	callLeader func(op byte, request []byte, timeout time.Duration) ([]byte, error)

	wake  chan struct{} // holds one token: there may be something to take
	slots chan struct{} // a token for each batch under way
	ended chan struct{} // closed when run has ended

	mu      sync.Mutex // guards what follows, and taken and abandoned of every write
	waiting []*write
	bytes   int // of waiting
}

func newWrites(m *metrics, log hclog.Logger) *writes {
	return &writes{
		log: log, metrics: m,
		wake:  make(chan struct{}, 1),
		slots: make(chan struct{}, batchesInFlight),
		ended: make(chan struct{}),
	}
}

// submit has a command executed, and waits for its outcome as long as ctx allows.
func (b *writes) submit(ctx context.Context, command []byte) outcome {
	w := &write{command: command, done: make(chan outcome, 1)}
	if err := b.add(w); err != nil {
		return outcome{err: err}
	}
	return b.wait(ctx, w)
}

// run commits batches until ctx ends.
func (b *writes) run(ctx context.Context) {
	defer close(b.ended)
	for {
		select {
		case <-b.wake:
		case <-ctx.Done():
			return
		}
		for {
			select {
			case b.slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			batch := b.take()
			if len(batch) == 0 {
				<-b.slots
				break
			}
			go func() {
				b.commit(batch)
				<-b.slots
			}()
		}
	}
}

// idle waits until no batch is under way and says whether that came about before ctx ended.
func (b *writes) idle(ctx context.Context) bool {
	for taken := range cap(b.slots) {
		select {
		case b.slots <- struct{}{}:
		case <-ctx.Done():
			for range taken {
				<-b.slots
			}
			return false
		}
	}
	for range cap(b.slots) {
		<-b.slots
	}
	return true
}

// add queues writes, all or none.
func (b *writes) add(writes ...*write) error {
	size := 0
	for _, w := range writes {
		size += len(w.command)
	}
	b.mu.Lock()
	if b.bytes > 0 && b.bytes+size > maxWaiting {
		b.mu.Unlock()
		return ErrOverloaded
	}
	b.waiting = append(b.waiting, writes...)
	b.bytes += size
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
		if size += len(w.command); size > maxBatchBytes && len(batch) > 0 {
			break
		}
		b.bytes -= len(w.command)
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
	commands := make([][]byte, len(batch))
	for i, w := range batch {
		commands[i] = w.command
	}
	if future := b.propose(commands); future != nil {
		b.await(future, batch)
		return
	}
	own := batch[:0]
	request := []byte(nil)
	for _, w := range batch {
		if w.hop {
			w.done <- outcome{err: ErrNotLeader}
		} else {
			own = append(own, w)
			request = appendCommands(request, [][]byte{w.command})
		}
	}
	if len(own) > 0 {
		b.forward(request, own)
	}
}

// await gives a batch its outcome when the entry that holds it has its own.
func (b *writes) await(future raft.ApplyFuture, batch []*write) {
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- future.Error() }()
	select {
	case err := <-done:
		b.metrics.commit.Observe(time.Since(began).Seconds())
		results, _ := future.Response().([][]byte)
		switch {
		case err == nil && len(results) == len(batch):
			for i, w := range batch {
				w.done <- outcome{Result: Result{Index: future.Index(), Data: results[i]}}
			}
			return
		case err != nil && future.Index() == 0:
			finish(batch, ErrNotLeader) // it never was in the log
			return
		}
		b.log.Debug("a log entry failed", "index", future.Index(), "commands", len(batch), "error", err)
	case <-b.ended: // Raft may leave a future unanswered when it shuts down
	}
	finish(batch, ErrUnknownOutcome) // the next leader may still commit the entry
}

// forward passes a batch on to the leader.
func (b *writes) forward(request []byte, batch []*write) {
	b.metrics.forwarded.Add(float64(len(batch)))
	answer, err := b.callLeader(opApply, request, requestTimeout)
	if err != nil {
		finish(batch, err)
		return
	}
	outcomes, err := decodeOutcomes(answer, len(batch))
	if err != nil {
		b.log.Error("the leader's answer makes no sense", "error", err)
		finish(batch, ErrUnknownOutcome)
		return
	}
	for i, w := range batch {
		w.done <- outcomes[i]
	}
}

// handleApply executes commands that another node passed on to this one. It answers with an error only when none of
// them can have been executed.
func (b *writes) handleApply(ctx context.Context, _ string, request []byte) ([]byte, error) {
	commands, err := decodeCommands(request)
	if err != nil {
		return nil, err
	}
	batch := make([]*write, len(commands))
	for i, c := range commands {
		batch[i] = &write{command: c, hop: true, done: make(chan outcome, 1)}
	}
	if err := b.add(batch...); err != nil {
		finish(batch, err)
	}
	var answer []byte
	for _, w := range batch {
		answer = appendOutcome(answer, b.wait(ctx, w))
	}
	return answer, nil
}

// finish gives all writes the same outcome.
func finish(writes []*write, err error) {
	for _, w := range writes {
		w.done <- outcome{err: err}
	}
}

// The outcomes of forwarded commands travel as one byte of status, the entry's index and the result's length as
// uvarints, and the result. A status names one of these errors, 0 none: the numbers are a format.
var outcomeErrors = []error{0: nil, 1: ErrNotLeader, 2: ErrOverloaded, 3: ErrNotInTime, 4: ErrUnknownOutcome}

func appendOutcome(b []byte, o outcome) []byte {
	status := byte(4) // an error that is not in the list promises nothing
	for i, err := range outcomeErrors {
		if o.err == nil && i == 0 || err != nil && errors.Is(o.err, err) {
			status = byte(i)
			break
		}
	}
	b = binary.AppendUvarint(append(b, status), o.Index)
	b = binary.AppendUvarint(b, uint64(len(o.Data)))
	return append(b, o.Data...)
}

// decodeOutcomes reads the outcomes of n commands.
func decodeOutcomes(b []byte, n int) ([]outcome, error) {
	malformed := errors.New("malformed outcomes")
	outcomes := make([]outcome, n)
	for i := range outcomes {
		if len(b) == 0 || int(b[0]) >= len(outcomeErrors) {
			return nil, malformed
		}
		outcomes[i].err = outcomeErrors[b[0]]
		b = b[1:]
		index, m := binary.Uvarint(b)
		if m <= 0 {
			return nil, malformed
		}
		b = b[m:]
		size, m := binary.Uvarint(b)
		if m <= 0 || size > uint64(len(b)-m) {
			return nil, malformed
		}
		outcomes[i].Result = Result{Index: index, Data: b[m : m+int(size)]}
		b = b[m+int(size):]
	}
	if len(b) > 0 {
		return nil, malformed
	}
	return outcomes, nil
}
