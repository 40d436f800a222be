#!/bin/sh
# Renews the files of a package in static/ from npm: `vendor.sh folder package@version file...`. With each go the
# package's licence, VERSION and SHA256SUMS; what else is in the folder is ours and stays.
# Needs npm; asks the registry that npm is set up for.
set -eu

target=$(cd "$(dirname "$0")" && pwd)/$1
package=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
npm pack --silent "$package" >archive-name
tar -xzf "$(tail -n 1 archive-name)"

mkdir -p "$target"
for file in "$@"; do
    cp "package/$file" "$target/"
done
cd "$target"
sed -n 's/^ *"version": *"\([^"]*\)".*/\1/p' "$work/package/package.json" >VERSION
test -s VERSION
for file in "$@"; do
    sha256sum "$(basename "$file")"
done >SHA256SUMS
echo "${package%@*} $(cat VERSION) is in $target"
