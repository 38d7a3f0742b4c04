# From llvm-objdump's listing of one function: its innermost loops that multiply integers, each to a file of its own.
#
#   awk -v out=PREFIX -f mca.awk LISTING      prints FILE, instructions and products of each
#
# A loop is what a branch back spans; an innermost one spans no other. Products are those of the dot-product (16),
# matrix (32) and widening multiply instructions (8).
function number(text) { # hexadecimal
    value = 0
    for (i = 1; i <= length(text); i++) value = 16 * value + index("0123456789abcdef", substr(text, i, 1)) - 1
    return value
}
function products(name) {
    if (name ~ /^[su]dot$/) return 16
    if (name ~ /^[su]?[us]mmla$/) return 32
    if (name ~ /^[su]m(ull|lal)2?$/) return 8
    return 0
}
$1 ~ /^[0-9a-f]+:$/ {
    n++
    at[n] = number(substr($1, 1, length($1) - 1))
    place[at[n]] = n
    name[n] = $2
    line = $0
    sub(/^[^:]*:[ \t]*/, "", line)
    sub(/[ \t]*<.*$/, "", line)
    if ($2 ~ /^(b|b\..*|cbn?z|tbn?z)$/ && match(line, /0x[0-9a-f]+$/)) {
        target[n] = number(substr(line, RSTART + 2))
        # Where it goes is no matter for the pipeline.
        line = substr(line, 1, RSTART - 1) "."
    }
    text[n] = line
}
END {
    for (end = 1; end <= n; end++) {
        if (!(end in target) || !(target[end] in place) || place[target[end]] > end) continue
        start = place[target[end]]
        if (start in loop && loop[start] <= end) continue
        loop[start] = end
    }
    for (start = 1; start <= n; start++) {
        if (!(start in loop)) continue
        end = loop[start]
        inner = 0
        for (other in loop) {
            if ((other + 0 != start) && other + 0 >= start && loop[other] <= end) inner = 1
        }
        sum = 0
        for (i = start; i <= end; i++) sum += products(name[i])
        if (inner || sum == 0) continue
        file = out "." (++loops) ".s"
        for (i = start; i <= end; i++) print text[i] > file
        close(file)
        print file, end - start + 1, sum
    }
}
