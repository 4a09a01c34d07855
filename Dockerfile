# An image with the binary, a directory for its state, and nothing else. docs/operations.md says how to build and run it.
ARG GO_VERSION=1.26.8

FROM golang:${GO_VERSION} AS build
WORKDIR /src
# Set this if the default proxy of Go modules cannot be reached.
ARG GOPROXY
# The modules are a layer of their own, so they are downloaded again only when these two files change.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /out/raftstarter . && mkdir -m 700 -p /out/state/data

FROM scratch
ARG VERSION=dev
LABEL org.opencontainers.image.title="Raft Starter" \
      org.opencontainers.image.description="A highly available key-value service: JSON over HTTP, replicated with Raft" \
      org.opencontainers.image.version="$VERSION"
COPY --from=build /out/raftstarter /raftstarter
# A new volume gets the owner of this directory. The user is a number, because Kubernetes cannot tell from a name that it is not root.
COPY --from=build --chown=65532:65532 /out/state/ /
USER 65532:65532
ENV STATE_DIR=/data
EXPOSE 11000 12000
HEALTHCHECK --interval=10s --timeout=5s --retries=3 CMD ["/raftstarter", "--healthcheck"]
ENTRYPOINT ["/raftstarter"]
