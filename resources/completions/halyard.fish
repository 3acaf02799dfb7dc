# fish completion for halyard. The program itself knows what may come next.

function __halyard_complete
    set -l last (commandline -ct)
    set -l words (commandline -opc) "$last"
    for line in ($words[1] complete -- $words 2>/dev/null)
        if test "$line" = :files
            __fish_complete_path "$last"
        else
            printf '%s\n' $line
        end
    end
end

complete -c halyard -f -a '(__halyard_complete)'
