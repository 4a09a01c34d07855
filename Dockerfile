# The binary, a directory for its state, and nothing else. README.md says how to build and run it.
ARG GO_VERSION=1.26.8

FROM golang:${GO_VERSION} AS build
WORKDIR /src
# Set it where the default proxy of Go modules cannot be reached.
ARG GOPROXY
# A layer of their own: modules are downloaded again only when these two files change.
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
# A new volume takes over whom this directory belongs to. Kubernetes can tell that a user is not root only by a number.
COPY --from=build --chown=65532:65532 /out/state/ /
USER 65532:65532
ENV STATE_DIR=/data
EXPOSE 11000 12000
HEALTHCHECK --interval=10s --timeout=5s --retries=3 CMD ["/raftstarter", "--healthcheck"]
ENTRYPOINT ["/raftstarter"]
