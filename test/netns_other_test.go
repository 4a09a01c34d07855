//go:build !linux

package test

import (
	"errors"
	"testing"
)

func newNamespaces(*testing.T, []*proc) (wires, error) {
	return nil, errors.New("only Linux has network namespaces")
}

// diskClasses are the faults of disks: none where there are no loop devices.
func diskClasses() []faultClass { return nil }
