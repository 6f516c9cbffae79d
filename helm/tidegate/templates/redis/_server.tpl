{{- /*
One Redis or Valkey with an append-only file: configuration, Service and StatefulSet.
Arguments: context, name ("redis" or "gcs-redis"), values (its own), secret and key (of its password).
The password reaches the server in a file: an argument would stand in the process table.
*/ -}}
{{- define "tidegate.server" -}}
{{- $redis := .context.Values.redis }}
{{- $namespace := .context.Release.Namespace }}
{{- $component := dict "context" .context "component" .name }}
{{- $name := printf "%s-%s" (include "tidegate.fullname" .context) .name }}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- include "tidegate.labels" $component | nindent 4 }}
data:
  redis.conf: |
    {{- include "tidegate.serverConfig" . | nindent 4 }}
  start.sh: |
    {{- include "tidegate.serverStart" . | nindent 4 }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- include "tidegate.labels" $component | nindent 4 }}
spec:
  {{- include "tidegate.ipFamilies" .context | nindent 2 }}
  selector:
    {{- include "tidegate.selector" $component | nindent 4 }}
  ports:
    - name: redis
      port: 6379
      targetPort: redis
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- include "tidegate.labels" $component | nindent 4 }}
spec:
  replicas: 1
  serviceName: {{ $name }}
  selector:
    matchLabels:
      {{- include "tidegate.selector" $component | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tidegate.selector" $component | nindent 8 }}
      annotations:
        # The server reads its file at start only.
        tidegate.dev/config: {{ printf "%s%s" (include "tidegate.serverConfig" .) (include "tidegate.serverStart" .) | sha256sum | trunc 16 | quote }}
        {{- include "tidegate.secretsAnnotation" (dict "context" .context "secrets" (list .secret)) | nindent 8 }}
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      {{- include "tidegate.pullSecrets" .context | nindent 6 }}
      securityContext:
        {{- include "tidegate.podSecurity" $redis.runAsUser | nindent 8 }}
      terminationGracePeriodSeconds: 60
      {{- with .values.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- include "tidegate.placement" .values | nindent 6 }}
      containers:
        - name: redis
          image: {{ printf "%s:%s%s" $redis.image.repository $redis.image.tag (ternary (printf "@%s" $redis.image.digest) "" (ne $redis.image.digest "")) | quote }}
          imagePullPolicy: {{ $redis.image.pullPolicy }}
          command: [sh, /etc/redis/start.sh]
          args:
            {{- toYaml $redis.command | nindent 12 }}
            - /etc/redis/redis.conf
          ports:
            - name: redis
              containerPort: 6379
          # Reading a large file back takes a while, in which it answers LOADING.
          startupProbe:
            {{- include "tidegate.serverProbe" $redis.client | nindent 12 }}
            periodSeconds: 2
            timeoutSeconds: 5
            failureThreshold: 300
          livenessProbe:
            {{- include "tidegate.serverProbe" $redis.client | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            {{- include "tidegate.serverProbe" $redis.client | nindent 12 }}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 3
          resources:
            {{- toYaml (.values.resources | default dict) | nindent 12 }}
          securityContext:
            {{- include "tidegate.containerSecurity" . | nindent 12 }}
          workingDir: /data
          volumeMounts:
            - name: config
              mountPath: /etc/redis
              readOnly: true
            - name: password
              mountPath: /etc/redis-password
              readOnly: true
            - name: run
              mountPath: /run/redis
            - name: data
              mountPath: /data
      volumes:
        - name: config
          configMap:
            name: {{ $name }}
        - name: password
          secret:
            secretName: {{ .secret }}
            defaultMode: 0440
            items:
              - key: {{ .key }}
                path: password
        - name: run
          emptyDir: {medium: Memory, sizeLimit: 1Mi}
        {{- if not .values.persistence.enabled }}
        - name: data
          emptyDir: {}
        {{- end }}
  {{- if .values.persistence.enabled }}
  persistentVolumeClaimRetentionPolicy:
    whenDeleted: {{ ternary "Retain" "Delete" .values.persistence.retain }}
    whenScaled: Retain
  volumeClaimTemplates:
    - apiVersion: v1
      kind: PersistentVolumeClaim
      metadata:
        name: data
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .values.persistence.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ .values.persistence.size }}
  {{- end }}
{{- end }}

{{- define "tidegate.serverConfig" -}}
port 6379
bind * -::*
dir /data
appendonly yes
appendfsync everysec
save ""
# A queue must not be evicted: full means that writes are refused.
maxmemory {{ .values.maxMemory }}
maxmemory-policy noeviction
# Written by start.sh.
include /run/redis/password.conf
{{- end }}

{{- /* $(cat) leaves out the newline that editors and `echo` put at a Secret's end. */ -}}
{{- define "tidegate.serverStart" -}}
set -eu
umask 077
password=$(cat /etc/redis-password/password)
case $password in
'') echo "Secret {{ .secret }}: {{ .key }} is empty. Put a password into it." >&2; exit 1 ;;
*[[:cntrl:]]*) echo "Secret {{ .secret }}: {{ .key }} holds a line break or another control character inside. Write it anew." >&2; exit 1 ;;
esac
printf '%s' "$password" >/run/redis/password
printf '%s' "$password" | sed -e 's/[\\"]/\\&/g' -e 's/^/requirepass "/' -e 's/$/"/' >/run/redis/password.conf
exec "$@"
{{- end }}

{{- define "tidegate.serverProbe" -}}
{{- if . -}}
exec:
  command: [sh, -c, '[ "$(REDISCLI_AUTH=$(cat /run/redis/password) {{ . }} ping)" = PONG ]']
{{- else -}}
tcpSocket:
  port: redis
{{- end -}}
{{- end }}

{{- /* Its password, unless somebody else has written it, wherever Ray's pods read it. Arguments: context, name, values,
       secret. */ -}}
{{- define "tidegate.serverSecret" -}}
{{- if not .values.auth.existingSecret }}
{{- $arguments := . }}
{{- $key := .values.auth.existingSecretKey }}
{{- $password := include "tidegate.kept" (dict "context" .context "secret" .secret "key" $key "length" 40) }}
{{- range $namespace := append (include "tidegate.namespaces" .context | fromJsonArray) .context.Release.Namespace | uniq }}
apiVersion: v1
kind: Secret
metadata:
  name: {{ $arguments.secret }}
  namespace: {{ $namespace }}
  labels:
    {{- include "tidegate.labels" (dict "context" $arguments.context "component" $arguments.name) | nindent 4 }}
type: Opaque
data:
  {{ $key }}: {{ $password }}
---
{{- end }}
{{- end }}
{{- end }}
