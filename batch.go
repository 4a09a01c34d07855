package main

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
)

const (
	maxBatchBytes   = 256 << 10 // of commands in one log entry, but for a single larger one
	batchesInFlight = 2         // entries being committed, or batches being passed on, while the next one gathers
	maxWaiting      = 32 << 20  // bytes of commands that may wait; beyond it the node is overloaded
)

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

	taken     bool // it is in a batch: from here on it may be executed. Guarded by batcher.mu
	abandoned bool // nobody waits for it any more, and it never was in a batch. Guarded by batcher.mu
}

// batcher gathers the commands that arrive while others are being committed into one log entry, or into one message to
// the leader (group commit: Gawlick and Kinkade, "Varieties of Concurrency Control in IMS/VS Fast Path", 1985).
type batcher struct {
	// commit gives every write of a batch its outcome.
	commit func(batch []*write)

	wake  chan struct{} // holds one token: there may be something to take
	slots chan struct{} // a token for each batch under way

	mu      sync.Mutex // guards what follows, and taken and abandoned of every write
	waiting []*write
	bytes   int // of waiting
}

func newBatcher(commit func([]*write)) *batcher {
	return &batcher{
		commit: commit,
		wake:   make(chan struct{}, 1),
		slots:  make(chan struct{}, batchesInFlight),
	}
}

// run commits batches until ctx ends.
func (b *batcher) run(ctx context.Context) {
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
func (b *batcher) idle(ctx context.Context) bool {
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
func (b *batcher) add(writes ...*write) error {
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
func (b *batcher) take() []*write {
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
func (b *batcher) wait(ctx context.Context, w *write) outcome {
	select {
	case o := <-w.done:
		return o
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if w.taken {
		return outcome{err: ErrUnknownOutcome}
	}
	w.abandoned = true
	return outcome{err: ErrNotInTime}
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
