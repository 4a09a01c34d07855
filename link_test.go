package main

import "raftstarter/test/link"

// What becomes of what one node sends to another: see package link.
const (
	linkOpen        = link.Open
	linkCut         = link.Cut
	linkHold        = link.Hold
	linkHoldAnswers = link.HoldAnswers
	linkHoldRaft    = link.HoldChosen // only answers to Raft's messages
	linkSlow        = link.Slow
)

// isRaft says by its hello whether a connection carries Raft's messages.
func isRaft(hello []byte) bool {
	return len(hello) > len(helloMagic) && hello[len(helloMagic)] == kindRaft
}
