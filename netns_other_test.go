//go:build !linux

package main

import (
	"errors"
	"testing"
)

func newNamespaces(*testing.T, []*proc) (wires, error) {
	return nil, errors.New("only Linux has network namespaces")
}
