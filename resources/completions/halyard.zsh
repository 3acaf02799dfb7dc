#compdef halyard
# zsh completion for halyard. The program itself knows what may come next.

_halyard() {
    local line word
    local -a found
    for line in ${(f)"$("${words[1]}" complete -- "${(@)words[1,CURRENT]}" 2>/dev/null)"}; do
        if [[ $line == :files ]]; then
            _files
        else
            word=${line%%$'\t'*}
            found+=("${word//:/\\:}:${line#*$'\t'}")
        fi
    done
    (( $#found )) && _describe halyard found
}

if [[ $funcstack[1] == _halyard ]]; then
    _halyard "$@"
else
    compdef _halyard halyard
fi
