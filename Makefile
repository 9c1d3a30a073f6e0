# make        builds bin/ocickpt
# make test   everything there is to check; needs root, sets itself up
# make demo   shows a shell tree and redis checkpointed and restored
# make bench  the table of the README
# make fuzz   each fuzz target for FUZZTIME
# make lint   formatting, vet, staticcheck

GO ?= go
# runc_nocriu leaves libcontainer's CRIU client out. nsenter needs cgo.
TAGS := -tags runc_nocriu
FUZZTIME ?= 30s
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
UNIT = $(shell $(GO) list $(TAGS) ./... | grep -v /integration)

export CGO_ENABLED = 1

.PHONY: all build test unit integration demo bench fuzz lint setup clean

all: build

build:
	$(GO) build $(TAGS) -trimpath -o bin/ocickpt ./cmd/ocickpt

setup:
	@hack/setup

# gofmt lists files and succeeds; an empty list is what is wanted.
lint:
	@unformatted=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not gofmt'ed: $$unformatted" >&2; exit 1; fi
	$(GO) vet $(TAGS) ./...
	$(GO) run $(STATICCHECK) $(TAGS) ./...

unit:
	@hack/gotest $(TAGS) -race -timeout 10m $(UNIT)

# No cached result, because the host is part of what is tested. The tests run in
# processes of their own, some side by side.
integration:
	@hack/gotest $(TAGS) -count=1 -timeout 25m ./integration/...

test: setup
	@hack/test

demo: setup build
	@hack/demo

bench: setup build
	@hack/bench

fuzz: setup
	@hack/fuzz $(FUZZTIME)

clean:
	rm -rf bin
