#!/bin/sh
# Renews the vendored Swagger UI from npm: the newest 5.x, or the one in VERSION (VERSION=5.31.0 make update-swagger-ui).
# index.html and docs.js in the same folder are ours and stay. Needs npm; asks the registry that npm is set up for.
set -eu

target=$(cd "$(dirname "$0")" && pwd)/swagger-ui
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
npm pack --silent "swagger-ui-dist@${VERSION:-5}" >archive-name
tar -xzf "$(tail -n 1 archive-name)"

cd package
set -- swagger-ui.css swagger-ui-bundle.js swagger-ui-bundle.js.LICENSE.txt favicon-16x16.png favicon-32x32.png \
    LICENSE NOTICE
sed -n 's/^ *"version": *"\([^"]*\)".*/\1/p' package.json >VERSION
test -s VERSION
sha256sum "$@" >SHA256SUMS
cp "$@" VERSION SHA256SUMS "$target/"
echo "Swagger UI $(cat VERSION) is in $target"
