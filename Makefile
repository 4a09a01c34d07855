.PHONY: help run cluster test race lint bench ci

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

run: ## run one node, at localhost:11000
	go run .

cluster: ## run a cluster of three nodes on this machine
	go build -o ./tmp/app && go tool goreman -logtime=false -set-ports=false -exit-on-stop=false start

test: ## run all tests
	go test ./...

race: ## run all tests with the race detector
	go test -race ./...

lint: ## run the linters
	golangci-lint run ./...

bench: ## run the benchmarks
	go test -run '^$$' -bench . -benchmem .

ci: ## run all checks; .ci/run --list names them
	.ci/run
